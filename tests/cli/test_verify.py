"""`llmprune verify` believes the files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import REPORT, WEIGHTS, Outcome, with_value
from helpers import edit_tensor


@pytest.fixture
def pruned(run: Callable[..., Outcome], flags: list[str]) -> Path:
    """A pruned tiny model in the working folder."""
    assert run(*flags, "--method", "wanda", "--out", "pruned").code == 0
    return Path("pruned")


def test_verify_believes_the_files(run: Callable[..., Outcome], pruned: Path) -> None:
    result = run("verify", pruned)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("the pattern holds in every layer\n")
    assert run("verify", pruned, "--sparsity", "2:4").code == 0
    assert run("verify", pruned, "--sparsity", "50%").code == 0
    assert run("verify", pruned, "--sparsity", "50%", "--scope", "row").code == 0
    edit_tensor(pruned, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[0, :4].fill_(1.0))
    for arguments in ((), ("--sparsity", "2:4")):
        broken = run("verify", pruned, *arguments)
        assert broken.code == 1
        assert "VIOLATED model.layers.1.mlp.up_proj: 2 zeros missing" in broken.out
        assert broken.out.count("VIOLATED") == 1
    report = json.loads(run("verify", pruned, "--json").out)
    assert report["violations"] == 2
    assert [layer["name"] for layer in report["layers"] if layer["violations"]] == ["model.layers.1.mlp.up_proj"]
    assert run("verify", pruned, "--skip", "*.1.mlp.up_proj").code == 0
    assert run("verify", pruned, "--only", "*.up_proj").code == 1


def test_verify_says_when_the_pattern_is_another(run: Callable[..., Outcome], pruned: Path, tiny: Path) -> None:
    assert run("verify", pruned, "--sparsity", "3:4").code == 1
    assert run("verify", pruned, "--sparsity", "1:4").code == 0
    dense = run("verify", tiny, "--sparsity", "2:4")
    assert dense.code == 1
    assert "14 layers violate the pattern" in dense.out


def test_verify_refuses_what_it_cannot_check(
    refused: Callable[..., Outcome], tiny: Path, tmp_path: Path, pruned: Path
) -> None:
    refused("verify", "no/such/folder", says="there is no folder")
    refused("verify", tmp_path, "--sparsity", "2:4", says="config.json")
    refused("verify", tiny, says=REPORT, hints="--sparsity")
    refused("verify", tiny, "--sparsity", "4:2")
    refused("verify", tiny, "--sparsity", "2:4", "--only", "nothing", says="matches none")
    refused("verify", tiny, "--method", "wanda", says="'--method'")
    weights = pruned / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("verify", pruned, says="not a whole safetensors file")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sparsity": {"pattern": "2:4"}}'])
def test_verify_refuses_a_damaged_report(refused: Callable[..., Outcome], pruned: Path, content: str) -> None:
    (pruned / REPORT).write_text(content)
    refused("verify", pruned, says=REPORT)


def test_verify_does_not_ask_of_skipped_layers_what_they_cannot_hold(
    run: Callable[..., Outcome], flags: list[str]
) -> None:
    job = with_value(flags, "--sparsity", "1:3")
    assert run(*job, "--only", "*.down_proj", "--out", "out").code == 0
    assert run("verify", "out").code == 0


def test_verify_misses_no_layer_of_the_report(run: Callable[..., Outcome], pruned: Path) -> None:
    report = json.loads((pruned / REPORT).read_text())
    report["layers"][0]["name"] = "model.layers.7.self_attn.q_proj"
    (pruned / REPORT).write_text(json.dumps(report))
    assert run("verify", pruned).code != 0
