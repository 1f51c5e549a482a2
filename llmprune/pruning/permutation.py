"""A permutation of a layer's inputs in which a pattern with groups keeps more.

Whether a permutation can be folded into the layers that make the inputs is for others to find out
(`llmprune.structure.coupling`); here one is only chosen, among those that the caller allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.pruning.linalg import inverse_factor
from llmprune.pruning.pattern import SparsityPattern

SWEEPS = 2
GROUPS_AT_A_TIME = 512
SALIENCY_DAMPING = 0.03


def saliency(weight: Tensor, gram: Tensor) -> tuple[Tensor, int]:
    """The saliency of every weight for a permutation, `W_ij² · (H_jj / [(H + λI)⁻¹]_jj)^½`.

    `W_ij² H_jj` is the loss if no other weight compensates (Wanda squared), `W_ij² / [H⁻¹]_jj` if all other weights of
    its row do (OBS). A sweep along the columns lies between: the first pruned weights have all others to their right,
    the last ones none. So this is the geometric mean of the two, which gave the lowest layer errors of the three.

    Args:
        weight: W, `(out, in)`.
        gram: H, `(in, in)`.

    Returns:
        `(out, in)`, and how often λ was raised tenfold.

    Raises:
        NumericalError: H is not finite, or stays singular.
    """
    factor = inverse_factor(gram, SALIENCY_DAMPING)
    return weight.square() * (gram.diagonal() / factor.upper.square().sum(0)).sqrt(), factor.retries


def choose(
    score: Tensor,
    pattern: SparsityPattern,
    classes: Sequence[Tensor],
    *,
    sweeps: int = SWEEPS,
    chunk: int = GROUPS_AT_A_TIME,
) -> Tensor:
    """The permutation of the inputs with which the pattern keeps more of `score[:, order]` than of `score`.

    With K = M − N kept in a group, a group of inputs retains `Σ_rows (the K largest scores)`; wanted is the partition
    into groups that retains most. Inputs sorted by their total score are dealt to the groups back and forth (Zhang et
    al. 2024, "Plug-and-Play", heuristic channel reallocation); then in every step each group offers one random member,
    and the offered inputs are dealt anew in the best way: with t the K-th largest score of the other members, input c
    adds `Σ_rows max(s_c − t, 0)` to a group, and the Hungarian algorithm finds the best assignment. No step retains
    less than before.

    Differs from the paper: the member that is offered is drawn at random instead of standing at a fixed place, so that
    an input can meet all others; wide layers are improved `chunk` random groups at a time, which keeps the cost of a
    sweep linear in the number of inputs; and the gains are distances: `max(a, 0) = (|a| + a) / 2` makes the matrix of
    all gains one `torch.cdist` with p = 1.

    Args:
        score: `(out, in)`, not negative, any float dtype.
        pattern: one that is `permutable`: N units of every M consecutive inputs are pruned.
        classes: which inputs may change places, each `(copies, free)`, int64, all positions different: columns of such
            a matrix move together. `(1, in)` lets all inputs move freely; for attention with shared value heads, a
            class is `(query heads per value head, head width)`. Other positions keep their inputs, as do those of a
            class whose copies are not cut into groups in the same way.
        sweeps: how often every member of every group is offered, on average.
        chunk: how many groups trade at a time.

    Returns:
        The order, `(in,)`, int64: position p is to get input `order[p]`. The identity if nothing better was found.
    """
    assert pattern.group is not None
    m = pattern.group
    n = pattern.count(m)
    score = pattern.units(score.to(torch.promote_types(score.dtype, torch.float32)))
    order = torch.arange(score.shape[1], device=score.device)
    generator = torch.Generator().manual_seed(0)
    for slots in (matrix.to(score.device) for matrix in classes):
        if (groups := _groups(slots, m)) is None:
            continue
        columns = score.T[slots].transpose(0, 1).reshape(slots.shape[1], -1)
        members = _improve(columns, _deal(columns, m), n, sweeps, chunk, generator)
        if _retained(columns, members, n) > _retained(columns, groups, n):
            order[slots[:, groups]] = slots[:, members]
    return order


def classes_left(classes: Sequence[Tensor], kept: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """The classes among the inputs `kept (k,)`, renumbered, and which columns of each are kept (bool).

    A class that loses all inputs has no column left.
    """
    number = torch.full((width,), -1)
    number[kept.cpu()] = torch.arange(len(kept))
    left = []
    for slots in classes:
        kept_slots = number[slots] >= 0
        left.append((number[slots][kept_slots.any(1)][:, kept_slots.any(0)], kept_slots.any(0)))
    return left


def _groups(slots: Tensor, m: int) -> Tensor | None:
    """The groups that a class is cut into, `(groups, m)`: numbers of columns of `slots`. None if its copies differ."""
    if slots.shape[1] % m or slots.shape[1] == m:
        return None
    group = slots // m
    columns = slots[0].argsort()
    cut = group[:, columns].view(len(slots), -1, m)
    return columns.view(-1, m) if bool((cut == cut[..., :1]).all()) else None


def _deal(columns: Tensor, m: int) -> Tensor:
    """Deal the inputs to the groups by falling total score, back and forth: `(groups, m)`."""
    dealt = columns.sum(1, dtype=torch.float64).argsort(descending=True, stable=True).view(m, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.contiguous()


def _improve(columns: Tensor, members: Tensor, n: int, sweeps: int, chunk: int, generator: torch.Generator) -> Tensor:
    """Exchange members between groups: `columns (inputs, rows)`, `members (groups, m)`."""
    for _ in range(sweeps):
        shuffle = torch.rand(members.shape, generator=generator).argsort(1).to(members.device)
        members = members.gather(1, shuffle)
        for at in range(members.shape[1]):
            for part in torch.split(torch.randperm(len(members), generator=generator).to(members.device), chunk):
                members[part] = _trade(columns, members[part], at, n)
    return members


def _trade(columns: Tensor, members: Tensor, at: int, n: int) -> Tensor:
    """Assign the members at one place of the groups anew, in the best way."""
    from scipy.optimize import linear_sum_assignment

    offered = columns[members[:, at]]
    others = columns[torch.cat([members[:, :at], members[:, at + 1 :]], 1)]
    # The K-th largest of the other M − 1 is the N-th smallest.
    least = others.kthvalue(n, dim=1).values
    # Σ max(s − t, 0) = ½ (Σ|s − t| + Σs − Σt); terms of a row or a column alone do not change the best assignment.
    gain = torch.cdist(least, offered, p=1)
    _, best = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    traded = members.clone()
    traded[:, at] = members[torch.from_numpy(best).to(members.device), at]
    return traded


def _retained(columns: Tensor, members: Tensor, n: int) -> float:
    """The sum of the kept scores of all groups."""
    return sum(
        float(columns[part].topk(members.shape[1] - n, dim=1).values.sum(dtype=torch.float64))
        for part in torch.split(members, GROUPS_AT_A_TIME)
    )
