"""The table of criteria by which whole experts are removed: name -> where its class is, and one line of help.

A criterion is a frozen dataclass derived from `ExpertCriterion`; `select(use, choice)` chooses the experts that stay.
The output projections of these are refitted by `experts.refit`. Adding one: a class here, one line in the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from llmprune.pruning.methods import TableEntry, load_entry

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.pruning.experts.problem import Choice, ExpertUse


class ExpertCriterion(ABC):
    """What every criterion does."""

    __slots__ = ()

    @abstractmethod
    def select(self, use: ExpertUse, choice: Choice) -> Tensor:
        """The experts that stay, `(kept,)`, int64, rising."""


EXPERT_CRITERIA = {
    "reap": TableEntry(
        "llmprune.pruning.experts.scores:REAP", "smallest mean of gate value x output norm over the expert's tokens"
    ),
    "frequency": TableEntry("llmprune.pruning.experts.scores:Frequency", "fewest tokens"),
    "wanda": TableEntry(
        "llmprune.pruning.experts.scores:Wanda", "smallest column x norm of the gated input, in the output projection"
    ),
    "obs": TableEntry(
        "llmprune.pruning.experts.leave_one_out:OBS",
        "what the others compensate best once the router sends its tokens to them",
    ),
}


def load_expert_criterion(name: str, options: Mapping[str, str] | None = None) -> ExpertCriterion:
    """Instantiate a criterion of the table.

    Args:
        name: its name.
        options: values for its fields, as text; the others keep their defaults.

    Raises:
        InputError: it has no such option, or the value is no positive number.
    """
    return cast("ExpertCriterion", load_entry(name, EXPERT_CRITERIA[name], options))
