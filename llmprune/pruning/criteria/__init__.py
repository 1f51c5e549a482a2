"""The table of criteria by which channels and heads are removed: name -> where its class is, and one line of help.

A criterion is a frozen dataclass whose fields are its options; `select(problem, count)` says which units of every pool
go. What the rest is made of is for others to say (`llmprune.pruning.criteria.reconstruct`). Adding one: a class
here, one line in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from llmprune.pruning.methods import MethodEntry, load_entry

if TYPE_CHECKING:
    from llmprune.pruning.criteria.problem import Choice, RemovalProblem


class Criterion(Protocol):
    """What every criterion provides."""

    needs: ClassVar[frozenset[str]]

    @property
    def zero_threshold(self) -> float | None:
        """Fraction of the root mean square up to which an input counts as zero, if zeros are counted."""
        ...

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """The units that go, exactly `count` of every pool."""
        ...


CRITERIA = {
    "magnitude": MethodEntry("llmprune.pruning.criteria.scores:Magnitude", "smallest columns of weights go"),
    "scaling": MethodEntry(
        "llmprune.pruning.criteria.scores:Scaling", "smallest learned scale of the channel goes, where there is one"
    ),
    "obd": MethodEntry("llmprune.pruning.criteria.scores:OBD", "smallest diagonal second-order loss goes"),
    "wanda": MethodEntry("llmprune.pruning.criteria.scores:Wanda", "smallest column x input norm goes"),
    "apoz": MethodEntry("llmprune.pruning.criteria.scores:APoZ", "inputs that are most often zero, or nearly so, go"),
    "obs": MethodEntry(
        "llmprune.pruning.criteria.obs:OBS", "what the rest can best make up for goes, greedily, with swaps", 8, 8.0
    ),
    "lasso": MethodEntry(
        "llmprune.pruning.criteria.lasso:Lasso", "the Lasso path chooses what the output is best made of", 8, 8.0
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
