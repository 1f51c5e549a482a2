"""The table of pruning methods: name -> where its class is, and one line of help.

A method is a frozen dataclass whose fields are its options. `scope` says where an unstructured count is exact unless
the user says otherwise, and `solve(problem, pattern)` returns one solution per layer of a group. Adding a method: one
file here, one line in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

if TYPE_CHECKING:
    from llmprune.pattern import Scope, SparsityPattern
    from llmprune.problem import GroupProblem, LayerSolution


class Method(Protocol):
    """What every method provides."""

    scope: ClassVar[Scope]

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group; pure: no modules, no device policy."""
        ...


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A row of the table: `target` is `module:Class`."""

    target: str
    help: str


METHODS = {
    "magnitude": MethodEntry(
        "llmprune.methods.magnitude:Magnitude", "smallest weights go; the floor for others to beat"
    ),
    "wanda": MethodEntry("llmprune.methods.wanda:Wanda", "smallest |weight| x input norm in each row go"),
    "sparsegpt": MethodEntry(
        "llmprune.methods.sparsegpt:SparseGPT", "second-order choice, the kept weights make up for the pruned ones"
    ),
}
DEFAULT_METHOD = "sparsegpt"


def load_method(name: str) -> Method:
    """Instantiate a method of the table with its default options."""
    module, _, attribute = METHODS[name].target.partition(":")
    return cast("Method", getattr(import_module(module), attribute)())
