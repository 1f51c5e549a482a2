"""Golden outputs: sha256 of every tensor and of every other file that seven runs on a tiny model write.

A refactoring changes none of them, whichever files the tensors lie in.

Floating-point results depend on the processor and on torch, so the recorded hashes count only where both are the same.
To record them anew, after a change that is meant to change results, in the root of a checkout:
`PYTHONPATH=.:tests python tests/integration/test_golden.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import random_tokens, save_tiny, text_file, token_file, without_header

from llmprune import Job, Progress, prune

RECORD = Path(__file__).with_name("golden.json")
TIMED = {"prune_report.json", "prune_report.html", "README.md"}
"""Files that hold times and paths; of the report, the layers are hashed."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Files whose tensors are hashed instead."""

RUNS: dict[str, dict[str, Any]] = {
    "2:4 by balanced": {"effort": "balanced"},
    "50 % by sparsegpt": {"sparsity": "50%", "method": "sparsegpt"},
    "channels and 2:4": {"sparsity": "channels:25%+2:4"},
    "refinement": {"method": "sparsegpt", "reconstruct": 2},
    "self-generated text": {"method": "sparsegpt", "self_calibration": 1.0},
}


class Stopped(BaseException):
    """Ends a run as an interruption would."""


class Stopping(Progress):
    """Stops a run behind so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left, self.label = blocks, ""

    def start(self, label: str, total: float, unit: str = "") -> None:
        self.label = label

    def step(self, amount: float = 1, text: str = "") -> None:
        self.left -= self.label == "pruning"
        if not self.left:
            raise Stopped


def machine() -> str:
    """What the last bits depend on: torch and the kernels that it and its libraries choose for this processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    cpu = [said.get(key, "").strip() for key in ("model name", "cpu family", "model")]
    flags = hashlib.sha256(" ".join(sorted(said.get("flags", "").split())).encode()).hexdigest()[:8]
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{' '.join(cpu)} {torch.backends.cpu.get_cpu_capability()} {flags}, {libraries}"


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of a finished run; of the weights, of every tensor; of the report, of its layers."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    layers = json.loads(found["prune_report.json"])["layers"]
    figures = [[layer["name"], layer["pattern"], layer["pruned"], layer["error"], layer["status"]] for layer in layers]
    weights = [without_header(data) for name, data in found.items() if name.endswith(".safetensors")]
    found = {name: data for name, data in found.items() if name not in TIMED and not name.endswith(WEIGHTS)}
    found["layers of the report"] = json.dumps(figures).encode()
    for header, data in weights:
        for name, entry in header.items():
            if name != "__metadata__":
                assert name not in found
                start, stop = entry["data_offsets"]
                found[name] = json.dumps([name, entry["dtype"], entry["shape"]]).encode() + data[start:stop]
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(found.items())}


def outputs(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The runs, one after the other, each with its hashes."""
    model, calib = folder / "model", folder / "tokens.safetensors"
    save_tiny("llama", model, num_hidden_layers=3, max_position_embeddings=128)
    token_file(calib, random_tokens(12, 64))
    text_file(folder / "eval.txt", 300)
    given: dict[str, Any] = {
        "model": str(model), "sparsity": "2:4", "calib": str(calib), "device": "cpu", "seed": 1, "eval_windows": 2,
        "eval_context": 32, "eval_text": str(folder / "eval.txt"),
    }  # fmt: skip
    for number, (name, options) in enumerate(RUNS.items()):
        out = folder / f"out{number}"
        prune(Job(**{**given, **options, "out": out}))
        yield name, digests(out)
    resumed = Job(**{**given, "effort": "best", "out": folder / "resumed"})
    with pytest.raises(Stopped):
        prune(resumed, Stopping(2))
    prune(resumed)
    yield "resumed, by best", digests(folder / "resumed")
    yield "two processes", digests(in_two(folder, model, calib))


def in_two(folder: Path, model: Path, calib: Path) -> Path:
    """The folder that two processes make."""
    out = folder / "two"
    flags = (
        f"--sparsity 2:4 --effort balanced --seed 1 --no-eval --device cpu --model {model} --calib {calib} --out {out}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*launcher, "-m", "llmprune", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_outputs_are_those_that_were_recorded(tmp_path: Path) -> None:
    wanted = json.loads(RECORD.read_text())
    if machine() not in wanted:
        pytest.skip("no hashes were recorded on a machine like this")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, found in outputs(tmp_path):
            assert found == wanted[machine()][name], name
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = {machine(): dict(outputs(Path(folder)))}
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(known | made, indent=1) + "\n")
