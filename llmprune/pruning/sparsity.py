"""What a run prunes: blocks, channels, heads and experts, which are removed, and then weights by a pattern.

`blocks:20%` and `blocks:6` remove whole transformer blocks, `channels:25%` MLP channels of every block, `heads:33%`
attention heads, `experts:25%` whole experts; `size:75%` stands for blocks, channels and heads that are chosen together
so that so much of the block parameters is left; `channels:20%+2:4` first makes the model smaller, then sparse; `none`
prunes nothing, where weights are only quantised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from llmprune.errors import InputError
from llmprune.pruning.pattern import Scope, SparsityPattern, parse_pattern, percent

Kind = Literal["blocks", "channels", "heads", "experts"]
NONE = "none"
SIZE = "size"
_REMOVAL = rf"\s*(blocks|channels|heads|experts|{SIZE})\s*:\s*(\d{{0,9}}\.?\d{{0,9}})\s*(%?)\s*"
HINT = (
    "size:75%, blocks:20%, channels:25%, heads:33%, experts:25%, a pattern such as 2:4 or 50%, or several of them with "
    "+ between"
)
WORDS: dict[Kind, str] = {
    "blocks": "transformer blocks",
    "channels": "MLP channels",
    "heads": "attention heads",
    "experts": "experts",
}


@dataclass(frozen=True, slots=True)
class Removal:
    """A ratio of the blocks, or of the channels, heads or experts of every block, is removed.

    Args:
        kind: of the units.
        ratio: of the units that are removed.
        count: of the blocks that are removed, in place of a ratio; 0 for none.
    """

    kind: Kind
    ratio: Fraction
    count: int = 0

    def __post_init__(self) -> None:
        if not self.count and not 0 < self.ratio < 1:
            left = "leaves none" if self.ratio >= 1 else "removes none"
            raise InputError(f"{self.name} {left} of the {WORDS[self.kind]}", f"use a ratio such as {self.kind}:25%")

    @property
    def name(self) -> str:
        """Canonical spelling."""
        return f"{self.kind}:{self.count or percent(self.ratio).replace(' ', '')}"

    def describe(self, done: Fraction | None = None) -> str:
        """What is removed, in words.

        Args:
            done: the ratio that is removed, where the model does not allow the one that was asked for.
        """
        removed = percent(self.ratio if done is None else Fraction(round(done * 1000), 1000))
        if self.count:
            # A number is always met.
            return f"{self.count} of the {WORDS[self.kind]}{'' if done is None else f' ({removed})'} removed"
        asked = percent(self.ratio)
        return f"{removed} of the {WORDS[self.kind]} removed" + ("" if removed == asked else f" ({asked} asked for)")


@dataclass(frozen=True, slots=True)
class Sparsity:
    """The removals of a run, then the pattern of the kept weights.

    Args:
        removals: blocks, channels, heads and experts, each kind once.
        pattern: of the kept weights; None if they are not pruned.
        size: the ratio of the block parameters that is to be left; None, or the removals are still to be chosen.
    """

    removals: tuple[Removal, ...]
    pattern: SparsityPattern | None
    size: Fraction | None = None

    @property
    def name(self) -> str:
        """Canonical spelling, as `parse_sparsity` reads it."""
        names = [part.name for part in (*self.removals, self.pattern) if part is not None]
        return "+".join(([] if self.size is None else [size_name(self.size)]) + names) or NONE

    def chosen(self, removals: Sequence[Removal]) -> Sparsity:
        """The same with the removals that were chosen for its size."""
        return Sparsity(tuple(sorted(removals, key=lambda removal: removal.kind)), self.pattern)

    @property
    def narrows(self) -> bool:
        """Whether layers lose channels or heads."""
        return any(removal.kind in {"channels", "heads"} for removal in self.removals)

    @property
    def blocks(self) -> Removal | None:
        """The removal of whole blocks, if there is one."""
        return next((removal for removal in self.removals if removal.kind == "blocks"), None)

    @property
    def drops_experts(self) -> bool:
        """Whether whole experts are removed."""
        return any(removal.kind == "experts" for removal in self.removals)

    @property
    def scope(self) -> str:
        """Where the count is exact: `group`, `row`, `layer`, or `model` where nothing but removal is asked for."""
        return "model" if self.pattern is None else self.pattern.scope

    def describe(self, nonuniform: bool = False, done: Mapping[Kind, Fraction] | None = None) -> str:
        """One phrase that leaves no doubt what is pruned.

        Args:
            nonuniform: whether every block has a ratio of its own.
            done: the ratios that the model allows to remove, where they are known.
        """
        removed = " and ".join(removal.describe((done or {}).get(removal.kind)) for removal in self.removals)
        pattern = self.pattern.describe() if self.pattern is not None else ""
        if self.pattern is not None and nonuniform:
            pattern = f"{percent(self.pattern.sparsity)} unstructured on average, every block with a ratio of its own"
        sized = "" if self.size is None else f"{percent(self.size)} of the block parameters left"
        return ", then ".join(filter(None, (sized, removed, pattern))) or "no weight is pruned"

    def __bool__(self) -> bool:
        """Whether anything is pruned."""
        return bool(self.removals) or self.pattern is not None or self.size is not None

    def speed_note(self) -> str:
        """What it does to file size and speed."""
        notes = []
        if self.removals:
            faster = self.narrows or self.blocks is not None
            notes = [f"The model is smaller{' and faster' if faster else ''} wherever it runs"]
            notes[0] += "" if faster else "; a token is sent to as many experts as before"
        return "; ".join(notes + ([self.pattern.speed_note()] if self.pattern is not None else []))


def parse_sparsity(text: str, scope: Scope = "layer") -> Sparsity:
    """Read `blocks:6`, `channels:25%`, `heads:0.33`, `2:4`, `50%`, and sums of them such as `channels:20%+2:4`.

    Args:
        text: what the user typed.
        scope: where the count of an unstructured pattern is exact.

    Raises:
        InputError: for anything else, with a hint.
    """
    if text.strip().lower() == NONE:
        return Sparsity((), None)
    removals: list[Removal] = []
    pattern: SparsityPattern | None = None
    sizes: list[Fraction] = []
    for part in text.split("+"):
        if match := re.fullmatch(_REMOVAL, part, re.ASCII):
            try:
                ratio = Fraction(match[2]) / (100 if match[3] else 1)
            except ValueError:
                raise InputError(f"unknown sparsity {text!r}", HINT) from None
            if match[1] == SIZE:
                sizes.append(ratio)
                continue
            counted = match[1] == "blocks" and not match[3] and ratio >= 1 and ratio.denominator == 1
            removals.append(Removal(cast("Kind", match[1]), ratio, int(ratio) if counted else 0))
        elif pattern is None:
            if ":" in part and part.partition(":")[0].strip().isalpha():
                raise InputError(f"unknown sparsity {text!r}", HINT)
            pattern = parse_pattern(part, scope)
        else:
            raise InputError(f"{text!r} asks for two patterns of weights", HINT)
    if len({removal.kind for removal in removals}) < len(removals):
        raise InputError(f"{text!r} asks twice for the same removal", HINT)
    return Sparsity(tuple(sorted(removals, key=lambda removal: removal.kind)), pattern, _size(text, sizes, removals))


def size_name(ratio: Fraction) -> str:
    """Canonical spelling of the ratio of the block parameters that is to be left."""
    return f"{SIZE}:{percent(ratio).replace(' ', '')}"


def _size(text: str, sizes: Sequence[Fraction], removals: Sequence[Removal]) -> Fraction | None:
    """The ratio that is to be left, None where no size is asked for; refused beside removals, or if nothing goes."""
    if not sizes:
        return None
    if sizes[1:] or removals:
        raise InputError(f"{text!r} names a size and what is to be removed", "size:75% chooses that itself: name one")
    if not 0 < sizes[0] < 1:
        left = "all" if sizes[0] >= 1 else "none"
        raise InputError(f"{size_name(sizes[0])} leaves {left} of the block parameters", "use a ratio such as size:75%")
    return sizes[0]
