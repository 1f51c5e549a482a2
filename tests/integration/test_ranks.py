"""Two processes find what one finds; the sums of floats come in another order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, token_file
from torch import Tensor, nn

from llmprune import Job, prune
from llmprune.errors import InputError
from llmprune.pipeline.prepare import prepare
from llmprune.progress import Progress
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import NM, Unstructured
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem
from llmprune.pruning.statistics import HELD_OUT
from llmprune.runtime.launch import launch
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.batch import Call
from llmprune.streaming.batch_shards import BatchSharding, held_out_batches
from llmprune.streaming.statistics import all_reduce_statistics

WINDOWS, LENGTH, BLOCKS = 10, 256, 3
LIMIT = 600
T = TypeVar("T")
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}
FREE = {"seconds", "peak_memory", "baseline_memory", "blocks", "out", "command"}

MANY = """
import json, sys
from contextlib import nullcontext
from pathlib import Path

import torch

from llmprune import Job, prune, run
from llmprune.runtime.launch import launch
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.batch import Call
from llmprune.pruning.statistics import HELD_OUT

forward = Call.run


def cramped(call, block, hidden):
    if len(hidden) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return forward(call, block, hidden)


with launch("cpu") as (group, device):
    for options in json.loads(Path(sys.argv[1]).read_text()):
        run.launch = lambda _: nullcontext((ProcessGroup(group.rank, group.world_size), device))
        Call.run = cramped if options.pop("cramped", False) and group.rank == 1 else forward
        prune(Job(**{**options, "out": Path(options["out"])}))
"""
BROKEN = """
import os, sys
from llmprune.cli import main as cli
from llmprune.pruning.layer_solver import LayerSolver
if os.environ["RANK"] == "1":
    def broken(*_):
        raise ValueError("this process is broken")
    LayerSolver.solve = broken
sys.exit(cli.main(sys.argv[1:]))
"""
KILLED = """
import os, signal, sys
from llmprune.streaming import activations
from llmprune.cli import main as cli
from llmprune.pipeline import state as resume
rank, place, wanted = os.environ["KILL"].split()
module = {"sync": activations, "_tidy": resume}[place]
original, calls = getattr(module, place), 0

def stop(*arguments):
    global calls
    calls += 1
    if calls == int(wanted):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

if os.environ["RANK"] == rank:
    setattr(module, place, stop)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, tokens, and programs to be started several times at once."""
    folder = tmp_path_factory.mktemp("given")
    sizes = {"num_hidden_layers": BLOCKS, "intermediate_size": 128, "max_position_embeddings": LENGTH}
    save_tiny("llama", folder / "model", **sizes)
    save_tiny("qwen3_moe", folder / "mixture", max_position_embeddings=LENGTH)
    # Where two choices are worth the same but for rounding, the other order of the sums may decide: not with this text.
    token_file(folder / "tokens.safetensors", random_tokens(WINDOWS, LENGTH, seed=4))
    for name, text in {"many": MANY, "broken": BROKEN, "killed": KILLED}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def arguments(given: Path, out: Path, *flags: str) -> list[str]:
    files = ["--model", str(given / "model"), "--calib", str(given / "tokens.safetensors"), "--out", str(out)]
    return [*files, "--no-eval", "--device", "cpu", *flags]


def start(program: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)


CASES: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
    "whole layers": {"sparsity": "50%", "method": "sparsegpt"},
    "steps": {"sparsity": "60%", "method": "wanda", "steps": 3, "ridge": 0.3},
    "steps and a refit": {"sparsity": "60%", "method": "admm", "steps": 2, "refit": True, "ridge": 0.3},
    "shares by error": {"sparsity": "60%", "method": "sparsegpt", "allocate": "error"},
    "shares by outliers": {"sparsity": "60%", "method": "wanda", "allocate": "owl"},
    "fewer blocks": {"sparsity": "blocks:1"},
    "channels": {"sparsity": "channels:50%"},
    "channels by zeros": {"sparsity": "channels:50%", "method": "apoz"},
    "channels, then 2:4": {"sparsity": "channels:50%+2:4"},
    "cramped": {"method": "sparsegpt", "targets": "dense", "cramped": True},
    "mixture of experts": {"model": "mixture"},
    "fewer experts": {"model": "mixture", "sparsity": "experts:50%", "method": "obs", "targets": "dense"},
    "narrower experts": {"model": "mixture", "sparsity": "channels:25%", "method": "apoz", "targets": "dense"},
}


def job_of(given: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    files = {"calib": str(given / "tokens.safetensors"), "out": str(out)}
    model = str(given / options.get("model", "model"))
    return {"sparsity": "2:4", **files, "evaluate": False, "device": "cpu", **options, "model": model}


@pytest.fixture(scope="module")
def outputs(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of all cases."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [job_of(given, folder / name, options) for name, options in CASES.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = start([str(given / "many.py"), str(folder / "jobs.json")])
    assert done.returncode == 0, done.stderr
    return folder


def refuse(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let blocks run out of memory on more than so many windows."""
    run = Call.run

    def limited(self: Call, block: nn.Module, hidden: Tensor) -> Any:
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, block, hidden)

    monkeypatch.setattr(Call, "run", limited)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_alike(one: Tensor, two: Tensor) -> Tensor:
    """Which rows have the same zeros and nearly the same weights."""
    return ((one == 0) == (two == 0)).all(1) & torch.isclose(two, one, **TOLERANCE).all(1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(
    name: str, given: Path, tmp_path: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cramped" in CASES[name]:
        # One process has room for two windows where each of two has it for one.
        refuse(monkeypatch, 2)
    options = {key: value for key, value in CASES[name].items() if key != "cramped"}
    job = Job(**{**job_of(given, tmp_path, options), "out": tmp_path / "one"})
    prune(job)
    one, two = reload(tmp_path / "one").state_dict(), reload(outputs / name).state_dict()
    close, compared = 1e-3, slice(None)
    if "steps" in options:
        # A refit magnifies rounding (of one process, too), and where it has moved an edge all that follows is another.
        alike = [rows_alike(tensor, two[key]) for key, tensor in one.items() if "layers.0.self_attn" in key]
        assert torch.cat(alike).double().mean() > 0.97
        one, close, compared = {}, 1e-2, slice(4)
    for key, tensor in one.items():
        assert torch.equal(tensor == 0, two[key] == 0), key
        torch.testing.assert_close(two[key], tensor, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
    before, after = (json.loads((f / "prune_report.json").read_text()) for f in (tmp_path / "one", outputs / name))
    windows = WINDOWS + before["calibration"]["self_generated"]
    tokens = windows * LENGTH
    # Blocks are trained on batches of one window here.
    fitted = (windows - len(held_out_batches(windows))) * LENGTH if before["reconstructions"] else tokens
    assert before["calibration"] == after["calibration"]
    for alone, shared in zip(before["layers"], after["layers"], strict=True):
        assert shared["tokens"] == alone["tokens"]
        assert shared["tokens"] == fitted or ".experts." in alone["name"]
    errors = [[layer["error"] for layer in report["layers"][compared]] for report in (before, after)]
    # Layers before removed blocks hardly change: their errors are rounding.
    assert errors[1] == pytest.approx(errors[0], rel=close, abs=1e-7)
    shares = after["processes"]
    assert shares["world_size"] == 2
    assert sum(shares["tokens"]) == tokens
    for counts in (shares["tokens"], shares["rows"]):
        assert max(counts) - min(counts) <= 0.2 * sum(counts) / 2


def contents(folder: Path) -> dict[str, Any]:
    """All files of a finished run; of the report all but times, memory and place."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    report = json.loads((folder / "prune_report.json").read_text())
    return found | {key: report[key] for key in report.keys() - FREE}


def test_processes_that_are_killed_go_on_behind_the_last_finished_block(
    given: Path, tmp_path: Path, outputs: Path
) -> None:
    out = tmp_path / "balanced"
    told = []
    # While the second process makes the second block durable, and while it drops what is no longer needed behind it.
    for where in ("1 sync 3", "1 _tidy 1"):
        done = start([str(given / "killed.py"), *arguments(given, out, "--sparsity", "2:4")], KILL=where)
        assert done.returncode != 0
        assert not out.exists()
        told.append(done.stderr)
    done = start(["-m", "llmprune", *arguments(given, out, "--sparsity", "2:4")])
    assert done.returncode == 0, done.stderr
    told.append(done.stderr)
    found = [re.findall(r"(\d) blocks were finished before", text) for text in told]
    assert found == [[], ["1"], ["2"]], found
    assert done.stdout.count("saved to") == 1
    assert os.listdir(tmp_path) == ["balanced"]
    assert contents(out) == contents(outputs / "balanced")


def test_one_that_fails_ends_all(given: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    flags = ("--sparsity", "2:4", "--method", "wanda")
    found = start([str(given / "broken.py"), *arguments(given, tmp_path / "out", *flags)])
    assert found.returncode != 0
    assert "this process is broken" in found.stderr
    assert time.monotonic() - began < LIMIT / 10
    assert not (tmp_path / "out").exists()


def prepared(given: Path, out: Path, **options: object) -> Job:
    base = Job(str(given / "model"), "2:4", calib=str(given / "tokens.safetensors"), out=out, evaluate=False)
    return replace(base, **options)  # type: ignore[arg-type]


def test_too_many_processes_are_refused(given: Path, tmp_path: Path) -> None:
    class Eleven(ProcessGroup):
        def all_gather_object(self, value: T) -> list[T]:
            return [value] * self.world_size

    with pytest.raises(InputError, match="11 processes cannot share 10 calibration windows"):
        prepare(prepared(given, tmp_path / "out", method="wanda"), Progress(), Eleven(0, 11))


def test_processes_that_have_not_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lonely:
        num_processes = 1

        def __init__(self, **_: object) -> None: ...

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llmprune.runtime.launch.PartialState", Lonely)
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but 1 of its processes have met"), launch("cpu"):
        pass


def test_a_process_alone_computes_nothing_new() -> None:
    with launch("cpu") as (group, device):
        assert group.is_single
        assert device == "cpu"
    stats = InputStats(3, torch.eye(2))
    assert all_reduce_statistics(stats, ["a"], group) is stats


@pytest.mark.parametrize(("windows", "batch", "size"), [(10, 8, 2), (7, 1, 3), (16, 4, 5), (5, 3, 1)])
def test_every_window_is_in_one_process_and_as_many_tokens_are_held_out(windows: int, batch: int, size: int) -> None:
    length = 12
    tokens = torch.arange(windows)[:, None].expand(-1, length)
    found: dict[int, list[int]] = {}
    fitted: dict[int, int] = {}
    for rank in range(size):
        own = tokens[BatchSharding(windows, batch, rank, size).own, 0].tolist()
        for shard in BatchSharding(windows, batch, rank, size).shards():
            found.setdefault(shard.batch, []).extend(shard.batch * batch + at for at in shard.own)
            fitted[shard.batch] = fitted.get(shard.batch, 0) + shard.fitted(length)
            assert [shard.batch * batch + at for at in shard.own] == [own.pop(0) for _ in shard.own]
        assert own == []
    assert sorted(window for group in found.values() for window in group) == list(range(windows))
    for number, group in found.items():
        whole = len(group) * length
        assert fitted[number] == whole - int(HELD_OUT * whole)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")], ids=str)
def test_pieces_cover_every_row_once(pattern: NM | Unstructured) -> None:
    heights = (7, 3, 1, 12)
    problem = GroupProblem(
        tuple(LayerProblem(f"layer{n}", torch.randn(height, 8)) for n, height in enumerate(heights)),
        InputStats(1, torch.eye(8)),
    )
    ranks = [RowSharding(ProcessGroup(number, 3)) for number in range(3)]
    pieces = ranks[0].pieces(problem, pattern)
    assert all(one.pieces(problem, pattern) == pieces for one in ranks[1:])
    for layer, height in enumerate(heights):
        rows = [range(piece.start, piece.stop) for at, piece, _ in pieces if at == layer]
        assert sorted(row for part in rows for row in part) == list(range(height))
    assert ranks[0].rows == ranks[2].rows
    assert sum(ranks[0].rows) == sum(heights)
