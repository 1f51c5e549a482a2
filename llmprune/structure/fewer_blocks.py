"""A model without some of its blocks: the config that says so, and the names that the other blocks then have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.sparsity import Removal
from llmprune.structure.config_search import changed_config, find_settings
from llmprune.structure.cut import Structure
from llmprune.structure.slicing import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HINT = "this model cannot lose blocks; remove channels (channels:25%) or weights (2:4) instead"
_DEPTH = re.compile(r"layer|depth|block")
_FIRST = re.compile(r"first|max_window|dense_layers")
"""Settings that count blocks from the first on, such as those with a dense MLP."""


@dataclass(frozen=True, slots=True)
class Renumbering:
    """The numbers that blocks have once others are gone.

    Args:
        prefixes: of the names of all blocks, in the model and on disk.
        kept: numbers of the blocks that stay, rising.
        total: number of blocks before.
    """

    prefixes: tuple[str, ...]
    kept: tuple[int, ...]
    total: int

    def __call__(self, name: str) -> str:
        """A name of something in a block that stays, or outside of the blocks, in the smaller model."""
        for prefix in self.prefixes:
            if match := re.match(rf"{re.escape(prefix)}\.(\d+)(?=\.|$)", name):
                return f"{prefix}.{self._new(int(match[1]))}{name[match.end() :]}"
        return name

    def _new(self, index: int) -> int:
        # Behind the last block files may have what readers other than transformers take for further ones.
        return self.kept.index(index) if index < self.total else index - self.total + len(self.kept)


def renumbering(skeleton: Skeleton, kept: Sequence[int]) -> Renumbering:
    """The new names of the blocks of a model; arguments as of `keep_blocks`.

    Raises:
        InputError: names on disk do not tell which block a tensor belongs to.
    """
    count = len(skeleton.blocks)
    stored = set.intersection(*(_stored_prefixes(skeleton, index) for index in range(count)))
    if not stored:
        raise InputError(f"the names on disk of {type(skeleton.model).__name__} do not number its blocks", HINT)
    return Renumbering((skeleton.block_path, min(stored, key=len)), tuple(kept), count)


def _stored_prefixes(skeleton: Skeleton, index: int) -> set[str]:
    """What may stand before a block's number in the names of all its tensors on disk."""
    found = []
    for name in skeleton.checkpoint.disk_names(skeleton.block_parameters(index)):
        parts = name.split(".")
        found.append({".".join(parts[:place]) for place, part in enumerate(parts) if part == str(index)})
    return set.intersection(*found)


def removed_count(removal: Removal, total: int) -> int:
    """How many of so many blocks are removed: the number that is nearest to the one asked for.

    Raises:
        InputError: that is none, or no block would be left.
    """
    count = removal.count or int(total * removal.ratio + Fraction(1, 2))
    if count == 0:
        raise InputError(
            f"{removal.name} of {total} blocks is {float(total * removal.ratio):.2f}, which rounds to none",
            f"name a number: blocks:1 is {1 / total:.0%}",
        )
    if count >= total:
        raise InputError(f"{removal.name} leaves none of the {total} transformer blocks", "remove fewer: blocks:20%")
    return count


def plan_blocks(skeleton: Skeleton, structure: Structure, removal: Removal, trust: bool) -> Structure:
    """The structure before the blocks are chosen: as many as asked for are removed, and these are the last ones.

    Whether a config can say it is checked for these, and for the blocks behind the first one. That one always stays:
    nothing before it could compensate.

    Raises:
        InputError: too many or too few, or the config cannot express it.
    """
    total = len(skeleton.blocks)
    count = removed_count(removal, total)
    keep_blocks(skeleton, structure, (0, *range(1 + count, total)), trust)
    small = keep_blocks(skeleton, structure, range(total - count), trust)
    text = f"{removal.name}: transformer blocks {total} -> {total - count} ({count / total:.1%} of them)"
    ratios = {**structure.ratios, "blocks": Fraction(count, total)}
    return replace(small, summary=(text, *structure.summary), ratios=ratios, whole=structure)


def keep_blocks(skeleton: Skeleton, structure: Structure, kept: Sequence[int], trust: bool) -> Structure:
    """The structure of a model that keeps some of its blocks.

    Args:
        skeleton: the dense model.
        structure: of the model with fewer channels, heads and experts, and all blocks.
        kept: numbers of the blocks that stay, rising.
        trust: whether code that comes with the model may run.

    Raises:
        InputError: no config says so: tensors would have other shapes, or blocks would be of another kind.
    """
    config, total, model = structure.config, len(skeleton.blocks), type(skeleton.model).__name__
    names, stays = renumbering(skeleton, kept), {skeleton.block_name(index) for index in kept}
    gone = {name for index in set(range(total)) - set(kept) for name in skeleton.block_parameters(index)}
    before = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    left = {name: shape for name, shape in (before | structure.shapes(skeleton)).items() if name not in gone}
    shapes: Shapes = {names(name): shape for name, shape in left.items()}
    changes, reason = find_settings(config, block_settings(config, kept, total), shapes, skeleton.compute, trust)
    if reason or not changes:
        raise InputError(f"the config of {model} cannot express {len(kept)} of {total} blocks: {reason}", HINT)
    smaller = changed_config(config, changes)
    blocks = skeleton.blocks_of(config) if structure.changes else skeleton.blocks
    for number, (index, new) in enumerate(zip(kept, skeleton.blocks_of(smaller), strict=True)):
        if differing := _difference(blocks[index], new, index, number):
            raise InputError(
                f"block {index} of {model} would be another one as block {number}: its {differing} would differ", HINT
            )
    mixtures = structure.mixtures
    if mixtures is not None:
        mixtures = replace(mixtures, cuts={name: cut for name, cut in mixtures.cuts.items() if name in stays})
    return replace(
        structure,
        cuts=tuple(cut for cut in structure.cuts if cut.block in stays),
        changes={**structure.changes, **changes},
        config=smaller,
        mixtures=mixtures,
        kept_blocks=tuple(kept),
    )


def block_settings(config: PreTrainedConfig, kept: Sequence[int], total: int) -> Iterator[dict[str, Any]]:
    """Candidate settings for the blocks that stay: their number, lists with an entry for each, lists of numbers of
    blocks, and how many of the first ones are special.

    Args:
        config: of the model; its language model's part is searched.
        kept: numbers of the blocks that stay, rising.
        total: number of blocks before.
    """
    settings = config.get_text_config().to_dict()
    number = {key: len(kept) for key, value in settings.items() if _is_depth(key, value, total)}
    lists = {
        key: [value[index] for index in kept]
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == total > 1 and "token" not in key and not _name_all(key, value)
    }
    numbered = {
        key: [new for new, index in enumerate(kept) if index in value]
        for key, value in settings.items()
        if key not in lists and isinstance(value, list) and value and _DEPTH.search(key) and _are_blocks(value, total)
    }
    first = {
        key: sum(index < value for index in kept)
        for key, value in settings.items()
        if type(value) is int and 0 < value < total and _FIRST.search(key)
    }
    yield {**number, **lists, **numbered, **first}
    yield {**number, **lists}


def _is_depth(key: str, value: Any, total: int) -> bool:
    return type(value) is int and value == total and _DEPTH.search(key) is not None


def _name_all(key: str, values: list[Any]) -> bool:
    """Whether a list names every block, as `moe_layers` may, and does not say something of each."""
    return _DEPTH.search(key) is not None and values == list(range(len(values)))


def _are_blocks(values: list[Any], total: int) -> bool:
    return all(type(value) is int and 0 <= value < total for value in values)


def _difference(old: nn.Module, new: nn.Module, index: int, number: int) -> str:
    """The first setting of a block that would not stay what it is, but for its own number; '' for none."""
    theirs = dict(new.named_modules())
    for name, module in old.named_modules():
        if (other := theirs.get(name)) is None:
            continue  # a view of a matrix of experts, which was put there to be pruned
        if type(other) is not type(module):
            return name or "class"
        for key, value in vars(module).items():
            if key.startswith("_") or type(value) not in {bool, str, float, int, type(None)}:
                continue
            now = vars(other).get(key)
            if value == now and type(value) is type(now):
                continue
            if type(value) is not int or (value, now) != (index, number):
                return f"{name}.{key}".lstrip(".")
    return ""
