"""The table of pruning methods: name -> where its class is, and one line of help.

A method is a frozen dataclass derived from `Method` whose fields are its options. It declares what it needs and costs,
and `solve(problem, pattern)` returns one solution per layer of a group. Adding a method: one file here, one line in the
table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, cast

from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.pruning.pattern import Scope, SparsityPattern
    from llmprune.pruning.problem import GroupProblem, LayerSolution


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of solving a group of layers once.

    Args:
        products: time, in products of the layers' weight `(out, in)` by its Gram, `2 · out · in²` operations each.
        squares: peak memory in float32 matrices of the Gram's size, `(in, in)`; added to `stacks`.
        stacks: peak memory in float32 matrices of the weights' size, `(out, in)`.
    """

    products: int = 0
    squares: float = 0.5
    stacks: float = 4.8


class Method(ABC):
    """What every method declares and does.

    Attributes:
        scope: where an unstructured count is exact, unless the user says otherwise.
        needs: names of statistics beyond the Gram: `norm_scale`, the learned scale of the norm that feeds the layers.
        cost: of `solve`.
    """

    __slots__ = ()

    scope: ClassVar[Scope] = "layer"
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[Cost] = Cost()

    @abstractmethod
    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """The pruned layers of one group; pure: no modules, no device policy."""


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A row of a table.

    Args:
        target: `module:Class`.
        help: one line.
    """

    target: str
    help: str


METHODS = {
    "magnitude": TableEntry(
        "llmprune.pruning.methods.magnitude:Magnitude", "smallest |weight| is pruned; the floor for others to beat"
    ),
    "wanda": TableEntry("llmprune.pruning.methods.wanda:Wanda", "smallest |weight| x input norm of a row is pruned"),
    "obd": TableEntry(
        "llmprune.pruning.methods.obd:OBD",
        "smallest weight squared x input mean square of the layer is pruned; of a row as wanda",
    ),
    "scaling": TableEntry(
        "llmprune.pruning.methods.norm_scale:Scaling",
        "smallest |weight| x learned scale of the norm that feeds the layer is pruned",
    ),
    "sparsegpt": TableEntry(
        "llmprune.pruning.methods.sparsegpt:SparseGPT",
        "second-order choice, the kept weights compensate the pruned ones",
    ),
    "admm": TableEntry(
        "llmprune.pruning.methods.admm:ADMM", "mask and weights optimised together, at several times the price"
    ),
}


def load_method(name: str, options: Mapping[str, str] | None = None) -> Method:
    """Instantiate a method of the table.

    Args:
        name: its name.
        options: values for its fields, as text; the others keep their defaults.

    Raises:
        InputError: the method has no such option, or the value is no positive number.
    """
    return cast("Method", load_entry(name, METHODS[name], options))


def load_entry(name: str, entry: TableEntry, options: Mapping[str, str] | None = None) -> object:
    """Instantiate a row of a table; see `load_method`."""
    module, _, attribute = entry.target.partition(":")
    cls = getattr(import_module(module), attribute)
    known = {field.name: float if field.type in {"float", float} else int for field in fields(cls)}
    values = {}
    for key, text in (options or {}).items():
        if key not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{name} has no option {key!r}", listed)
        values[key] = _positive(key, text, known[key])
    return cls(**values)


def _positive(key: str, text: str, kind: type[float] | type[int]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise InputError(f"option {key}={text} is no positive {kind.__name__}", f"for example {key}=0.01")
    return value
