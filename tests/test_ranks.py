"""Two processes find what one finds; the sums of floats come in another order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, token_file

from llmprune.errors import InputError
from llmprune.job import Job
from llmprune.launch import join
from llmprune.pattern import NM, Unstructured
from llmprune.prepare import prepare
from llmprune.problem import GroupProblem, InputStats, LayerProblem
from llmprune.progress import Progress
from llmprune.ranks import Ranks
from llmprune.together import spread_over

# A batch holds four windows, and its last one is held out: two processes with a batch each hold out the same ones.
WINDOWS, LENGTH = 8, 512
LIMIT = 120
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}

DRIVER = """
import os, sys
from llmprune import cli, together
if os.environ["RANK"] == "1":
    def broken(*_):
        raise ValueError("this process is broken")
    together.solve = broken
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, tokens, and a driver whose second process fails."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny("llama", folder / "model", num_hidden_layers=2, intermediate_size=128, max_position_embeddings=LENGTH)
    token_file(folder / "tokens.safetensors", random_tokens(WINDOWS, LENGTH))
    (folder / "driver.py").write_text(DRIVER)
    return folder


def arguments(given: Path, out: Path, *flags: str) -> list[str]:
    files = ["--model", str(given / "model"), "--calib", str(given / "tokens.safetensors"), "--out", str(out)]
    return [*files, "--no-eval", "--device", "cpu", *flags]


def start(program: list[str], size: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes, or in one."""
    launcher = [] if size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)


@pytest.mark.parametrize(
    "flags",
    [
        ("--sparsity", "2:4", "--effort", "fast"),
        ("--sparsity", "2:4", "--effort", "balanced"),
        ("--sparsity", "50%", "--method", "sparsegpt"),
        ("--sparsity", "60%", "--method", "sparsegpt", "--allocate", "error"),
        ("--sparsity", "60%", "--method", "wanda", "--allocate", "owl"),
        ("--sparsity", "2:4", "--effort", "best"),
        ("--sparsity", "channels:50%", "--effort", "balanced"),
        ("--sparsity", "channels:50%+2:4", "--effort", "balanced"),
    ],
    ids=" ".join,
)
def test_two_processes_find_what_one_finds(flags: tuple[str, ...], given: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(start, ["-m", "llmprune", *arguments(given, tmp_path / str(size), *flags)], size)
            for size in (1, 2)
        ]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr
    one, two = (reload(tmp_path / str(size)).state_dict() for size in (1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, two[name] == 0), name
        torch.testing.assert_close(two[name], tensor, **TOLERANCE)
    report = json.loads((tmp_path / "2" / "prune_report.json").read_text())
    shares = report["processes"]
    assert shares["size"] == 2
    assert sum(shares["tokens"]) == WINDOWS * LENGTH
    for counts in (shares["tokens"], shares["rows"]):
        assert max(counts) - min(counts) <= 0.2 * sum(counts) / 2
    assert all(layer["tokens"] == WINDOWS * LENGTH for layer in report["layers"])
    assert runs[1].result().stdout.count("saved to") == 1


def test_one_that_fails_ends_all(given: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    flags = ("--sparsity", "2:4", "--method", "wanda")
    found = start([str(given / "driver.py"), *arguments(given, tmp_path / "out", *flags)])
    assert found.returncode != 0
    assert "this process is broken" in found.stderr
    assert time.monotonic() - began < LIMIT / 2
    assert not (tmp_path / "out").exists()


def prepared(given: Path, out: Path, **options: object) -> Job:
    base = Job(str(given / "model"), "2:4", calib=str(given / "tokens.safetensors"), out=out, evaluate=False)
    return replace(base, **options)  # type: ignore[arg-type]


def test_too_many_processes_are_refused(given: Path, tmp_path: Path) -> None:
    run = prepare(prepared(given, tmp_path / "out", method="wanda"), Progress())
    assert spread_over(run, Ranks()) is run
    with pytest.raises(InputError, match="9 processes cannot share 8 calibration windows"):
        spread_over(run, Ranks(0, 9))


def test_processes_that_have_not_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lonely:
        num_processes = 1

        def __init__(self, **_: object) -> None: ...

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llmprune.launch.PartialState", Lonely)
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but 1 of its processes have met"), join("cpu"):
        pass


def test_a_process_alone_computes_nothing_new() -> None:
    with join("cpu") as (ranks, device):
        assert ranks.alone
        assert device == "cpu"
    stats = InputStats(3, torch.eye(2))
    assert ranks.summed(stats, ["a"]) is stats
    assert ranks.facts(torch.zeros(3, 4)) == {}


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")], ids=str)
def test_pieces_cover_every_row_once(pattern: NM | Unstructured) -> None:
    heights = (7, 3, 1, 12)
    problem = GroupProblem(
        tuple(LayerProblem(f"layer{n}", torch.randn(height, 8)) for n, height in enumerate(heights)),
        InputStats(1, torch.eye(8)),
    )
    ranks = [Ranks(number, 3) for number in range(3)]
    pieces = ranks[0]._pieces(problem, pattern)
    assert all(one._pieces(problem, pattern) == pieces for one in ranks[1:])
    for layer, height in enumerate(heights):
        rows = [range(piece.start, piece.stop) for at, piece, _ in pieces if at == layer]
        assert sorted(row for part in rows for row in part) == list(range(height))
    assert ranks[0].rows == ranks[2].rows
    assert sum(ranks[0].rows) == sum(heights)
