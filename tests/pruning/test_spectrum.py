"""The hints at a Gram's eigenvalues are what an eigendecomposition gives."""

from __future__ import annotations

import pytest
import torch

from llmprune.pruning.linalg import add_ridge
from llmprune.pruning.spectrum import input_spectrum


@pytest.mark.parametrize("width", [1, 2, 7, 64, 200])
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_the_figures_are_those_of_the_eigenvalues(width: int, outlier: float) -> None:
    rows = torch.randn(3 * width, width, dtype=torch.float64) * torch.logspace(0, -2, width, dtype=torch.float64)
    rows[:, width // 2] *= outlier
    gram = rows.T @ rows / len(rows)
    values = torch.linalg.eigvalsh(gram)
    spectrum = input_spectrum(gram.float())
    assert spectrum
    found = spectrum.figures(ridge=0.01)
    assert found["participation_ratio"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-4)
    share = float(values[-1] / values.sum())
    assert share * 0.9 <= found["top_eigenvalue_ratio"] <= share * (1 + 1e-5)
    damped = float(torch.linalg.cond(add_ridge(gram, 0.01)))
    assert damped * 0.9 <= found["condition"] * (1 + 1e-5)


def test_extremes() -> None:
    assert input_spectrum(torch.zeros(4, 4)) is None
    one = input_spectrum(torch.ones(5, 5))
    assert one
    assert one.figures(None) == pytest.approx({"participation_ratio": 1, "top_eigenvalue_ratio": 1})
    white = input_spectrum(torch.eye(5))
    assert white
    assert white.figures(None) == pytest.approx({"participation_ratio": 5, "top_eigenvalue_ratio": 0.2})
