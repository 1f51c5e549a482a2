"""Layer problems for the tests of the mathematics, and what every solution must hold."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.pruning.methods import METHODS, load_method
from llmprune.pruning.methods.sparsegpt import SparseGPT
from llmprune.pruning.pattern import NM, SparsityPattern, Unstructured
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution

HALF = Fraction(1, 2)
DAMPING = SparseGPT().damping
NMS = [NM(1, 2), NM(2, 4), NM(4, 8), NM(3, 5), NM(1, 4)]
SHARES = [
    Unstructured(HALF, "row"),
    Unstructured(HALF, "layer"),
    Unstructured(Fraction(3, 8), "layer"),
    Unstructured(Fraction(9, 10), "layer"),
]
INFORMED = [name for name in METHODS if name not in {"magnitude", "scaling"}]

every_method = pytest.mark.parametrize("name", METHODS)
informed_method = pytest.mark.parametrize("name", INFORMED)
every_pattern = pytest.mark.parametrize("pattern", [*NMS, *SHARES], ids=lambda p: f"{p.name}-{p.scope}")


def gram_of(width: int, seed: int = 0, tokens: int = 0) -> Tensor:
    """Gram of correlated inputs of uneven scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.randn(width, generator=generator, dtype=torch.float64).mul(0.5).exp()
    X = torch.randn(tokens or 3 * width, width, generator=generator, dtype=torch.float64) @ mixing * scale
    return X.T @ X / len(X)


def weight_of(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)


def group(gram: Tensor, *weights: Tensor, tokens: int = 100) -> GroupProblem:
    layers = tuple(LayerProblem(f"layer{at}", weight) for at, weight in enumerate(weights))
    return GroupProblem(layers, InputStats(tokens, gram, scale=norm_scale(len(gram))))


def norm_scale(width: int) -> Tensor:
    """Of the norm that feeds the layers."""
    return torch.linspace(0.5, 1.5, width)


def solve(name: str, gram: Tensor, weight: Tensor, pattern: SparsityPattern, tokens: int = 100) -> LayerSolution:
    (solution,) = load_method(name).solve(group(gram, weight, tokens=tokens), pattern)
    return solution


def cut(values: Tensor, pattern: SparsityPattern) -> np.ndarray:
    """The groups in which a pattern counts, as rows of a matrix."""
    if isinstance(pattern, NM):
        return values.reshape(-1, pattern.m).numpy()
    return values.reshape(len(values) if pattern.scope == "row" else 1, -1).numpy()


def block_quota(pattern: Unstructured, zeros: np.ndarray, start: int, stop: int) -> int:
    """Zeros go anyway; the rest of the count falls on columns in proportion to their nonzero weights."""
    beyond = max(quota(pattern, zeros.size) - int(zeros.sum()), 0)

    def upto(column: int) -> int:
        return int(Fraction(beyond * int((~zeros[:, :column]).sum()), max(int((~zeros).sum()), 1)) + HALF)

    return upto(stop) - upto(start) + int(zeros[:, start:stop].sum())


def quota(pattern: SparsityPattern, size: int) -> int:
    """The count of a group: N, or the share of its size, halves up."""
    return pattern.n if isinstance(pattern, NM) else int(pattern.sparsity * size + HALF)


def keep_largest(score: Tensor, pattern: SparsityPattern) -> Tensor:
    groups = cut(score, pattern)
    going = groups.argsort(axis=1, kind="stable")[:, : quota(pattern, groups.shape[1])]
    keep = np.ones_like(groups, dtype=bool)
    np.put_along_axis(keep, going, False, axis=1)
    return torch.from_numpy(keep).reshape(score.shape)


def assert_lawful(solution: LayerSolution, weight: Tensor) -> None:
    assert solution.weight.shape == solution.mask.shape == weight.shape
    assert solution.weight.dtype == weight.dtype
    assert solution.mask.dtype == torch.bool
    assert torch.isfinite(solution.weight).all()
    gone = solution.weight[~solution.mask]
    assert not gone.any()
    assert not torch.signbit(gone).any()


def with_dead(width: int, dead: list[int]) -> Tensor:
    gram = gram_of(width)
    gram[dead] = 0
    gram[:, dead] = 0
    return gram.float()


SLOW_CASES = [
    *[
        (NM(1, 2), 30),
        (NM(2, 4), 24),
        (NM(2, 4), 320),
        (NM(3, 5), 35),
        (NM(3, 5), 145),
        (NM(4, 8), 136),
        (NM(1, 4), 52),
    ],
    *[(Unstructured(HALF, scope), width) for scope in ("row", "layer") for width in (20, 128, 131, 320)],
    *[(Unstructured(Fraction(3, 8), "layer"), 269), (Unstructured(Fraction(9, 10), "row"), 205)],
]


slow_case = pytest.mark.parametrize(("pattern", "width"), SLOW_CASES, ids=str)


def refits(A: np.ndarray, weight: np.ndarray, supports: list[tuple[int, ...]]) -> np.ndarray:
    """Error of the best weights on every support, `(supports, rows)`: min (w − w₀)ᵀ A (w − w₀)."""
    errors = []
    for support in supports:
        kept = list(support)
        D = -weight.copy()
        D[:, kept] += np.linalg.solve(A[np.ix_(kept, kept)], (weight @ A)[:, kept].T).T
        errors.append(((D @ A) * D).sum(1))
    return np.array(errors)


PAIRS = list(combinations(range(4), 2))


OPTIMA = [
    (NM(2, 4), [(*left, *(4 + at for at in right)) for left in PAIRS for right in PAIRS], 2.8, 0.45),
    (Unstructured(HALF, "row"), list(combinations(range(8), 4)), 3.55, 0.37),
]
