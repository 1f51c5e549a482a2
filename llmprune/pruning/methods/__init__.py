"""The table of pruning methods: name -> where its class is, and one line of help.

A method is a frozen dataclass whose fields are its options. `scope` says where an unstructured count is exact unless
the user says otherwise, and `solve(problem, pattern)` returns one solution per layer of a group. Adding a method: one
file here, one line in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.pruning.pattern import Scope, SparsityPattern
    from llmprune.pruning.problem import GroupProblem, LayerSolution


class Method(Protocol):
    """What every method provides."""

    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[str]]

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group; pure: no modules, no device policy."""
        ...


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A row of the table.

    Args:
        target: `module:Class`.
        help: one line.
        products: what a solve takes, in products of the layer's weight by its Gram.
        squares, stacks: the memory that it takes, in float32 matrices of a Gram's size and of the weights' size.
    """

    target: str
    help: str
    products: int = 0
    squares: float = 0.5
    stacks: float = 4.8


METHODS = {
    "magnitude": MethodEntry(
        "llmprune.pruning.methods.magnitude:Magnitude", "smallest weights go; the floor for others to beat"
    ),
    "wanda": MethodEntry("llmprune.pruning.methods.wanda:Wanda", "smallest |weight| x input norm in each row go"),
    "obd": MethodEntry(
        "llmprune.pruning.methods.obd:OBD",
        "smallest weight squared x input mean square in the layer goes; in a row as wanda",
    ),
    "scaling": MethodEntry(
        "llmprune.pruning.methods.norm_scale:Scaling",
        "smallest |weight| x learned scale of the norm that feeds the layer goes",
    ),
    "sparsegpt": MethodEntry(
        "llmprune.pruning.methods.sparsegpt:SparseGPT",
        "second-order choice, the kept weights make up for the pruned ones",
        4,
        1.7,
        4.0,
    ),
    "admm": MethodEntry(
        "llmprune.pruning.methods.admm:ADMM",
        "mask and weights sought together, at several times the price",
        products=15,
        squares=4.1,
        stacks=5.2,
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


def load_entry(name: str, entry: MethodEntry, options: Mapping[str, str] | None = None) -> object:
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
