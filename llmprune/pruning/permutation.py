"""An order of a layer's inputs in which an N:M pattern keeps more.

Whether an order can be folded into the layers that make the inputs is for others to find out
(`llmprune.structure.coupling`); here an order is only chosen, among those that somebody else allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.pruning.linalg import inverse_factor
from llmprune.pruning.pattern import NM

SWEEPS = 2
GROUPS_AT_A_TIME = 512
SALIENCY_DAMPING = 0.03


def saliency(weight: Tensor, gram: Tensor) -> tuple[Tensor, int]:
    """What every weight is worth to an order of the inputs, `W_ij² · (H_jj / [(H + λI)⁻¹]_jj)^½`.

    `W_ij² H_jj` is the loss if nothing makes up for the weight (Wanda squared), `W_ij² / [H⁻¹]_jj` if all other weights
    of its row do (OBS). A sweep along the columns lies between: the first weights to go have all others to their right,
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
    score: Tensor, pattern: NM, classes: Sequence[Tensor], *, sweeps: int = SWEEPS, chunk: int = GROUPS_AT_A_TIME
) -> Tensor:
    """An order of the inputs such that the pattern keeps more of `score[:, order]` than of `score`.

    With K = M − N kept in a group, a group of inputs retains `Σ_rows (the K largest scores)`; wanted is the partition
    into groups that retains most. Inputs sorted by their total score are dealt to the groups back and forth (Zhang et
    al. 2024, "Plug-and-Play", heuristic channel reallocation); then in every step each group offers one random member,
    and the offered inputs are dealt anew in the best way: with t the K-th largest score of the members that stay, input
    c adds `Σ_rows max(s_c − t, 0)` to a group, and the Hungarian algorithm finds the best assignment. No step retains
    less than before.

    Differs from the paper: the member that is offered is drawn at random instead of standing at a fixed place, so that
    an input can meet all others; wide layers are improved `chunk` random groups at a time, which keeps the cost of a
    sweep linear in the number of inputs; and the gains are distances: `max(a, 0) = (|a| + a) / 2` makes the matrix of
    all gains one `torch.cdist` with p = 1.

    Args:
        score: `(out, in)`, not negative, any float dtype.
        pattern: N of every M inputs are pruned.
        classes: which inputs may change places, each `(copies, free)`, int64, all positions different: columns of such
            a matrix move together. `(1, in)` lets all inputs move freely; for attention with shared value heads, a
            class is `(query heads per value head, head width)`. Other positions keep their inputs, as do those of a
            class whose copies are not cut into groups in the same way.
        sweeps: how often every member of every group is offered, on average.
        chunk: how many groups trade at a time.

    Returns:
        The order, `(in,)`, int64: position p is to get input `order[p]`. The identity if nothing better was found.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    order = torch.arange(score.shape[1], device=score.device)
    generator = torch.Generator().manual_seed(0)
    for slots in (matrix.to(score.device) for matrix in classes):
        if (groups := _groups(slots, pattern.m)) is None:
            continue
        columns = score.T[slots].transpose(0, 1).reshape(slots.shape[1], -1)
        members = _improve(columns, _deal(columns, pattern.m), pattern, sweeps, chunk, generator)
        if _kept(columns, members, pattern) > _kept(columns, groups, pattern):
            order[slots[:, groups]] = slots[:, members]
    return order


def classes_left(classes: Sequence[Tensor], kept: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """The classes once only the inputs `kept (k,)` are left, counted anew, and which columns of each stay (bool).

    A class that is gone has no column left.
    """
    number = torch.full((width,), -1)
    number[kept.cpu()] = torch.arange(len(kept))
    left = []
    for slots in classes:
        stays = number[slots] >= 0
        left.append((number[slots][stays.any(1)][:, stays.any(0)], stays.any(0)))
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


def _improve(
    columns: Tensor, members: Tensor, pattern: NM, sweeps: int, chunk: int, generator: torch.Generator
) -> Tensor:
    """Exchange members between groups: `columns (inputs, rows)`, `members (groups, m)`."""
    for _ in range(sweeps):
        shuffle = torch.rand(members.shape, generator=generator).argsort(1).to(members.device)
        members = members.gather(1, shuffle)
        for at in range(pattern.m):
            for part in torch.split(torch.randperm(len(members), generator=generator).to(members.device), chunk):
                members[part] = _trade(columns, members[part], at, pattern)
    return members


def _trade(columns: Tensor, members: Tensor, at: int, pattern: NM) -> Tensor:
    """Deal the members at one place of the groups anew, in the best way."""
    from scipy.optimize import linear_sum_assignment

    offered = columns[members[:, at]]
    staying = columns[torch.cat([members[:, :at], members[:, at + 1 :]], 1)]
    # The K-th largest of the M − 1 that stay is the N-th smallest.
    least = staying.kthvalue(pattern.n, dim=1).values
    # Σ max(s − t, 0) = ½ (Σ|s − t| + Σs − Σt); terms of a row or a column alone do not change the best assignment.
    gain = torch.cdist(least, offered, p=1)
    _, best = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    traded = members.clone()
    traded[:, at] = members[torch.from_numpy(best).to(members.device), at]
    return traded


def _kept(columns: Tensor, members: Tensor, pattern: NM) -> float:
    """What the groups retain."""
    return sum(
        float(columns[part].topk(pattern.m - pattern.n, dim=1).values.sum(dtype=torch.float64))
        for part in torch.split(members, GROUPS_AT_A_TIME)
    )
