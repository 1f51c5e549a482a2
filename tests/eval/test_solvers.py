"""SparseGPT, ADMM and ALPS are compared on the Grams that the layers' own inputs have."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import reload
from layer_problems import gram_of, weight_of
from transformers import AutoTokenizer

from eval import solvers
from eval.alps import alps, growth
from llmprune.progress import Progress
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM, SparsityPattern, Unstructured
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import calibration_tokens


def test_all_solvers_see_the_same_layers(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "solvers.json"
    flags = ["--samples", "8", "--seq-len", "32", "--blocks", "1", "--out", str(out)]
    assert solvers.main([str(tiny), "--calib", str(text), *flags, "--sparsity", "2:4", "50%"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["solved"]
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [row["layer"].rpartition(".")[2] for row in rows] == 2 * kinds
    for row in rows:
        assert row["errors"]["alps"] < row["errors"]["sparsegpt"]
    printed = capsys.readouterr().out
    assert printed.strip() == solvers.table({"solved": rows})
    assert "| 2:4 | 7 all | " in printed


def test_the_error_is_that_of_the_inputs_of_the_whole_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "solvers.json"
    flags = ["--samples", "4", "--seq-len", "32", "--blocks", "0", "--out", str(out)]
    assert solvers.main([str(tiny), "--calib", str(text), *flags]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))["solved"][-1]
    model, inputs = reload(tiny), []
    layer = model.get_submodule(row["layer"])
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    sizes = {"samples": 4, "seq_len": 32, "seed": 0}
    batch = calibration_tokens(str(text), Reader(AutoTokenizer.from_pretrained(tiny), tmp_path, Progress()), **sizes)
    with torch.no_grad():
        model(batch.tokens)
        X = inputs[0].double()
        stats = InputStats(len(X), (X.T @ X / len(X)).float())
        problem = GroupProblem((LayerProblem("layer", layer.weight),), stats)
        (solution,) = load_method("sparsegpt").solve(problem, NM(2, 4))
        error = relative_error(layer.weight, solution.weight, stats)
    assert row["errors"]["sparsegpt"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(Fraction(1, 2))], ids=["2:4", "50%"])
def test_alps_obeys_the_pattern_and_ends_at_the_least_loss_of_its_support(pattern: SparsityPattern) -> None:
    gram, weight = gram_of(32), weight_of(8, 32)
    found = alps(weight, gram, pattern, 0.01)
    mask = found != 0
    assert int(mask.sum()) == weight.numel() // 2
    if isinstance(pattern, NM):
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
    A = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=gram.dtype)
    for row, target, kept in zip(found, weight, mask, strict=True):
        best = torch.linalg.solve(A[kept][:, kept], (A @ target)[kept])
        torch.testing.assert_close(row[kept], best, rtol=0.02, atol=0.02)


def test_the_penalty_grows_with_what_the_support_changes() -> None:
    assert [growth(changed) for changed in (0.001, 0.05, 0.2)] == [1.1, 1.2, 1.3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--blocks", "0", "--sparsity", "channels:25%"], "removes inputs"), (["--blocks", "7"], "model.layers.7.")],
)
def test_what_cannot_be_compared_is_refused(
    flags: list[str], message: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solvers.main([str(tiny), "--calib", str(text), "--samples", "2", "--seq-len", "16", *flags]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert "hint:" in found
