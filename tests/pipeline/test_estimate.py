"""What a dry run foretells is what a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, save_tiny, text_file, token_file

SCRIPT = """
import json, sys
from pathlib import Path
from llmprune import Job, prune
from llmprune.model import skeleton
from llmprune.run import dry_run

options = json.loads(sys.argv[1])
skeleton.EXPERT_MEMORY = options.pop("expert_memory", skeleton.EXPERT_MEMORY)
job = Job(**{**options, "out": Path(options["out"])})
estimated = dry_run(job)["estimate"]["memory"]
report = prune(job)
print(json.dumps([estimated, report.peak_memory - report.baseline_memory]))
"""
SIZES = {
    "vocab_size": 12000, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 24 M parameters, half of them in two blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "middle", dtype=torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of 30 M parameters, nearly all of them experts."""
    sizes = {"moe_intermediate_size": 512, "num_experts": 12, "num_local_experts": 12} | SIZES
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "mixture", dtype=torch.bfloat16, **sizes)


CASES: dict[str, dict[str, object]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "many tokens": {"method": "sparsegpt", "samples": 128},
    "balanced": {"effort": "balanced"},
    "quantised": {"effort": "balanced", "quantize": "int4"},
    "own text": {"method": "sparsegpt", "self_calibration": 1.0},
    "evaluated": {"method": "magnitude", "evaluate": True},
    "experts, one by one": {"method": "sparsegpt", "expert_memory": 8 * 2**20},
}


def measured(options: dict[str, object]) -> tuple[int, int]:
    """The peak of memory as estimated and as found in a process of its own, in bytes."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimated, found = json.loads(done.stdout.splitlines()[-1])
    return estimated, found


@pytest.mark.skipif(sys.platform != "linux", reason="resident size is read from /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_memory_is_estimated_within_a_fifth(case: str, model: Path, mixture: Path, tmp_path: Path) -> None:
    options = dict(CASES[case])
    model = mixture if case.startswith("experts") else model
    calib = token_file(tmp_path / "tokens.safetensors", random_tokens(128, 48))
    common = {"model": str(model), "sparsity": "2:4", "calib": str(calib), "out": str(tmp_path / "out")}
    common |= {"device": "cpu", "threads": 1, "samples": 16, "evaluate": False}
    common |= {"eval_text": str(text_file(tmp_path / "eval.txt", 2000)), "eval_context": 64, "eval_windows": 8}
    estimated, found = measured(common | options)
    if estimated > 1.2 * found:
        # The system may take away pages that nobody used for a while, so the larger of two peaks is nearer.
        found = max(found, measured(common | options | {"out": str(tmp_path / "again")})[1])
    print(f"{estimated / 2**20:.0f} MiB estimated, {found / 2**20:.0f} MiB found, {estimated / found:.2f}")
    assert estimated == pytest.approx(found, rel=0.2)
