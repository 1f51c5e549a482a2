"""Removal of attention heads: as many query heads from every kv group, or whole groups."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.sparsity import Removal
from llmprune.structure.coupling import Coupling


def head_options(groups: int, queries: int, ratio: Fraction) -> Iterator[tuple[int, int]]:
    """The ways to remove heads, `(pools, count)`, nearest to the requested ratio first.

    One pool of kv groups, or, where several query heads share keys and values, one pool for each group; of two equally
    near ways the former comes first: it saves keys and values too.

    Args:
        groups: kv heads.
        queries: query heads of each.
        ratio: of the query heads to be removed.
    """
    options = [(Fraction(count, groups), 0, 1, count) for count in range(1, groups)]
    options += [(Fraction(count, queries), 1, groups, count) for count in range(1, queries)]
    for _, _, pools, count in sorted(options, key=lambda option: (abs(option[0] - ratio), option[1])):
        yield pools, count


def check_share(removal: Removal, heads: int, kept: int) -> None:
    """Refuse a request that is nearer to no heads or to all of them than to the nearest possible number.

    Args:
        removal: as requested.
        heads: query heads.
        kept: query heads that would be kept.

    Raises:
        InputError: the request is that far off.
    """
    done = 1 - Fraction(kept, heads)
    if abs(done - removal.ratio) > min(removal.ratio, 1 - removal.ratio):
        raise InputError(
            f"{removal.name} of {heads} attention heads is {float(heads * (1 - removal.ratio)):.1f} left, which is "
            f"nearer to {heads if removal.ratio < done else 0} than to {kept}, the nearest that the config can express",
            f"choose another ratio, such as heads:{float(done):.0%}",
        )


def head_units(coupling: Coupling, pools: int) -> Tensor:
    """The inputs of a consumer grouped by heads, `(pools, units, size)`, int64.

    Args:
        coupling: of the consumer; a class is a kv group.
        pools: 1 for whole kv groups; or as many as there are, each with its query heads.
    """
    if pools == 1 and len(coupling.classes) > 1:
        return torch.stack([slots.flatten() for slots in coupling.classes])[None]
    return torch.stack(list(coupling.classes))


def head_text(removal: Removal, groups: int, queries: int, kept_groups: int, kept_heads: int) -> str:
    """The request and what is done, in a line.

    Args:
        removal: as requested.
        groups: kv heads.
        queries: query heads of each.
        kept_groups: kept kv heads.
        kept_heads: kept query heads, of all groups.
    """
    heads = groups * queries
    how = "whole kv groups" if kept_groups < groups and queries > 1 else "heads"
    if kept_groups == groups:
        removed = (heads - kept_heads) // groups
        how = f"{removed} query {'head' if removed == 1 else 'heads'} from every kv group"
    kv = f", kv heads {groups} -> {kept_groups}" if queries > 1 and kept_groups < groups else ""
    return f"{removal.name}: attention heads {heads} -> {kept_heads} ({1 - kept_heads / heads:.1%} of them, {how}){kv}"
