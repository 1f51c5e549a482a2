"""The table of criteria by which channels and heads are removed: name -> where its class is, and one line of help.

A criterion is a frozen dataclass derived from `Criterion` whose fields are its options; `select(problem, count)`
chooses the units of every pool to be removed. The weights of the others are `criteria.reconstruct`'s. Adding one: a
class here, one line in the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from llmprune.pruning.methods import Cost, TableEntry, load_entry

if TYPE_CHECKING:
    from llmprune.pruning.criteria.problem import Choice, RemovalProblem


class Criterion(ABC):
    """What every criterion declares and does.

    Attributes:
        needs: names of statistics beyond the Gram: `channel_scale`, the learned scale that multiplies every input;
            `zero_fraction`, how often every input is zero.
        cost: of `select`.
    """

    __slots__ = ()

    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[Cost] = Cost()

    @property
    def zero_threshold(self) -> float | None:
        """Fraction of the root mean square up to which an input counts as zero; None where zeros are not counted."""
        return None

    @abstractmethod
    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """The units to be removed, exactly `count` of every pool."""


CRITERIA = {
    "magnitude": TableEntry("llmprune.pruning.criteria.scores:Magnitude", "smallest columns of weights are removed"),
    "scaling": TableEntry(
        "llmprune.pruning.criteria.scores:Scaling", "smallest learned scale of the channel, where there is one"
    ),
    "obd": TableEntry("llmprune.pruning.criteria.scores:OBD", "smallest diagonal second-order loss"),
    "wanda": TableEntry("llmprune.pruning.criteria.scores:Wanda", "smallest column x input norm"),
    "apoz": TableEntry("llmprune.pruning.criteria.scores:APoZ", "inputs that are most often zero, or nearly so"),
    "obs": TableEntry("llmprune.pruning.criteria.obs:OBS", "what the others can best compensate, greedily, with swaps"),
    "lasso": TableEntry(
        "llmprune.pruning.criteria.lasso:Lasso", "the Lasso path chooses the channels that best make the output"
    ),
}


def load_criterion(name: str, options: Mapping[str, str] | None = None) -> Criterion:
    """Instantiate a criterion of the table.

    Args:
        name: its name.
        options: values for its fields, as text; the others keep their defaults.

    Raises:
        InputError: it has no such option, or the value is no positive number.
    """
    return cast("Criterion", load_entry(name, CRITERIA[name], options))
