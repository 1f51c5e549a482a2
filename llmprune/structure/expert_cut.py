"""The removal of whole experts: the tensors that lose a part for each, and the config that says the smaller number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model.experts import ExpertMatrix
from llmprune.model.skeleton import Skeleton, build_on_meta
from llmprune.structure.config_search import changed_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COUNT = r"(moe_)?(n|num)_(\w+_)?experts"
GROUPS = r"(n|num)_(\w+_)?groups?"


@dataclass(frozen=True, slots=True)
class ExpertCut:
    """The experts that one block loses.

    Args:
        block: its name.
        owner: local name of the module that holds the experts.
        count: number of experts.
        kept: how many stay.
        groups: the router's groups, of consecutive experts; as many stay in each.
        parts: tensors of the block that have a part for every expert (router rows, correction biases, fused weights),
            by local name, and the dimension along which these lie.
    """

    block: str
    owner: str
    count: int
    kept: int
    groups: int
    parts: Mapping[str, int]

    @property
    def router(self) -> list[str]:
        """Those of the parts that are not in the module that holds the experts."""
        return [local for local in self.parts if not local.startswith(f"{self.owner}.")]

    def layers(self, block: nn.Module) -> Iterator[str]:
        """Local names of the matrices of the experts of the block."""
        prefix = f"{self.owner}."
        return (
            local
            for local, part in block.named_modules()
            if isinstance(part, ExpertMatrix) and local.startswith(prefix)
        )

    def sliced(self, local: str, value: Tensor, kept: Tensor) -> Tensor:
        """A tensor of the block with the parts of some experts, in the order given.

        Args:
            local: its name.
            value: the tensor.
            kept: these experts, int64.
        """
        dimension = self.parts[local]
        shape = list(value.shape)
        shape[dimension : dimension + 1] = [self.count, shape[dimension] // self.count]
        parts = value.reshape(shape).index_select(dimension, kept.to(value.device))
        return parts.flatten(dimension, dimension + 1)


@dataclass(frozen=True, slots=True)
class Mixtures:
    """All cuts of experts, and the model that they lead to.

    Args:
        cuts: by the name of the block.
        changes: settings of the config with new values.
        config: of the model with fewer experts, and nothing else changed.
    """

    cuts: Mapping[str, ExpertCut]
    changes: dict[str, int]
    config: PreTrainedConfig

    @property
    def ratio(self) -> Fraction:
        """Of the experts that are removed."""
        cut = next(iter(self.cuts.values()))
        return Fraction(cut.count - cut.kept, cut.count)

    def shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The new shapes of the tensors that get smaller, by full name.

        Args:
            tensors: of the whole model.
        """
        found = {}
        for cut in self.cuts.values():
            for local, dimension in cut.parts.items():
                shape = list(tensors[f"{cut.block}.{local}"].shape)
                shape[dimension] = shape[dimension] // cut.count * cut.kept
                found[f"{cut.block}.{local}"] = tuple(shape)
        return found


def find_cuts(
    skeleton: Skeleton, owners: Mapping[str, str], count: int, kept: int, groups: int, trust: bool
) -> Mixtures:
    """The cuts that leave `kept` of `count` experts, and the setting of the config that says so.

    No name of a tensor is known: two models are built on the meta device, and the tensors whose shapes differ in their
    numbers of experts are those with a part for each.

    Args:
        skeleton: the model.
        owners: the modules that hold experts, by the name of their block; local names.
        count: number of experts.
        kept: how many stay.
        groups: of the router.
        trust: whether code that comes with the model may run.

    Raises:
        InputError: no setting makes such a model.
    """
    config, before = skeleton.config, {k: tuple(v.shape) for k, v in skeleton.model.state_dict().items()}
    reason = "it has no setting for the number of experts"
    for changes in _settings(config.get_text_config().to_dict(), count, kept):
        try:
            smaller = changed_config(config, changes)
            model = build_on_meta(smaller, skeleton.compute, trust)
        except Exception as error:  # every config class has checks of its own
            reason = f"with {_text(changes)}: {str(error) or type(error).__name__}".splitlines()[0]
            continue
        after = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parts, problem = _parts(before, after, count, kept)
        if problem:
            reason = f"with {_text(changes)}, {problem}"
            continue
        cuts = {
            block: ExpertCut(block, owner, count, kept, groups, _below(parts, block)) for block, owner in owners.items()
        }
        told = {f"{block}.{local}" for block, cut in cuts.items() for local in cut.parts}
        if missed := [name for name in parts if name not in told]:
            reason = f"with {_text(changes)}, {missed[0]!r} would change, outside of the blocks with experts"
        elif bare := [block for block, cut in cuts.items() if not _holds(cut)]:
            reason = f"with {_text(changes)}, the experts of {bare[0]!r} would stay as they are"
        else:
            return Mixtures(cuts, changes, smaller)
    raise InputError(
        f"the config of {config.model_type!r} cannot express {kept} of {count} experts: {reason}",
        "this model cannot lose experts; remove weights instead, e.g. --sparsity 2:4",
    )


def router_groups(config: PreTrainedConfig, count: int) -> list[int]:
    """Numbers of groups of experts that a router may have, likely ones first; 1 for none is the last."""
    settings = config.get_text_config().to_dict()
    found = [
        value
        for key, value in settings.items()
        if re.fullmatch(GROUPS, str(key)) and type(value) is int and value > 1 and count % value == 0
    ]
    return [*dict.fromkeys(found), 1]


def _settings(settings: Mapping[str, Any], count: int, kept: int) -> Iterator[dict[str, int]]:
    """Candidate settings: each that is called a number of experts and is this one, then all of them together."""
    names = [key for key, value in settings.items() if re.fullmatch(COUNT, str(key)) and value == count]
    yield from ({name: kept} for name in names)
    if len(names) > 1:
        yield dict.fromkeys(names, kept)


def _parts(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], count: int, kept: int
) -> tuple[dict[str, int], str]:
    """The tensors that have a part for every expert with its dimension, and what else would differ, or ''."""
    parts = {}
    if other := next(iter(before.keys() ^ after.keys()), ""):
        return {}, f"{other!r} would come or go"
    for name, shape in before.items():
        if shape == after[name]:
            continue
        differ = [d for d, (old, new) in enumerate(zip(shape, after[name], strict=False)) if old != new]
        if len(shape) != len(after[name]) or len(differ) != 1:
            return {}, f"{name!r} would be {after[name]} instead of {shape}"
        old, new = shape[differ[0]], after[name][differ[0]]
        if old % count or new * count != old * kept:
            return {}, f"{name!r} would be {after[name]} instead of {shape}"
        parts[name] = differ[0]
    return parts, "" if parts else "no tensor would get smaller"


def _below(parts: Mapping[str, int], block: str) -> dict[str, int]:
    prefix = f"{block}."
    return {name.removeprefix(prefix): at for name, at in parts.items() if name.startswith(prefix)}


def _holds(cut: ExpertCut) -> bool:
    """Whether the fused weights of the experts are among the tensors that get smaller."""
    return len(cut.router) < len(cut.parts)


def _text(changes: Mapping[str, int]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def shuffled(cut: ExpertCut, generator: torch.Generator) -> Tensor:
    """A random order of the experts, those of each group among themselves, none in its place, `(count,)`, int64."""
    size = cut.count // cut.groups
    order = torch.arange(cut.count).view(cut.groups, size)
    for members in order:
        cycle = members[torch.randperm(size, generator=generator)]
        members[cycle - members[0]] = cycle.roll(1)
    return order.flatten()
