"""A run may be stopped at any moment: the same command goes on from the last finished block, to the very same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    VOCAB,
    Toy,
    ToyConfig,
    edit_tensor,
    job,
    save_tiny,
    text_file,
    token_file,
    toy_block,
    word_tokenizer,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from llmprune import Job, prune
from llmprune.errors import InputError, PruneError
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.state import STATE, RunState, read_state
from llmprune.progress import Progress
from llmprune.reporting.html_report import PAGE
from llmprune.runtime.ownership import LOCK, MARK
from llmprune.streaming.activations import Filed
from llmprune.streaming.block import Block

BLOCKS = 4
FREE = {"seconds", "peak_memory", "baseline_memory", "blocks", "out"}


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note


def contents(folder: Path) -> dict[str, object]:
    """All files of a finished run but the page that draws the report; of that all but times, memory and the place."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PAGE}
    report = json.loads((folder / "prune_report.json").read_text())
    card = [line for line in (folder / "README.md").read_text().splitlines() if "time to prune" not in line]
    return found | {"prune_report.json": {key: report[key] for key in report.keys() - FREE}, "README.md": card}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of four blocks, tokens to calibrate on and text to evaluate on."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny("llama", folder / "model", num_hidden_layers=BLOCKS)
    tokenizer = word_tokenizer(VOCAB)
    tokenizer.bos_token = "w1"
    tokenizer.save_pretrained(folder / "model")
    token_file(folder / "tokens.safetensors")
    text_file(folder / "eval.txt", 300)
    return folder


@pytest.fixture
def work(given: Path, tmp_path: Path) -> Job:
    """A job that takes part of a second."""
    evaluation = {"evaluate": True, "eval_text": str(given / "eval.txt"), "eval_windows": 3, "eval_context": 32}
    return job(given / "model", tmp_path / "out", given / "tokens.safetensors", method="sparsegpt", **evaluation)


def partial(work: Job) -> Path:
    assert work.out
    return work.out.with_name(f".{work.out.name}.partial")


class Stopped(BaseException):
    """Ends a run as an interruption would."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a job and stop it right behind a block."""

    def call(work: Job, blocks: int, error: BaseException | None = None) -> None:
        commit = RunState.commit

        def stopping(journal: RunState, *arguments: Any) -> None:
            commit(journal, *arguments)
            if journal.blocks == blocks:
                raise error or Stopped

        with monkeypatch.context() as patch:
            patch.setattr(RunState, "commit", stopping)
            with pytest.raises((Stopped, PruneError)):
                prune(work)

    return call


RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"method": "sparsegpt"},
    "balanced": {"method": "auto", "effort": "balanced"},
    "best": {"method": "auto", "effort": "best"},
    "shares": {"sparsity": "50%", "allocate": "error"},
    "smaller": {"sparsity": "channels:25%+heads:50%+2:4", "method": "auto"},
}


@pytest.fixture(scope="module")
def reference(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], dict[str, object]]:
    """What a job gives if nobody stops it."""
    known: dict[Job, dict[str, object]] = {}

    def call(work: Job) -> dict[str, object]:
        key = replace(work, out=None)
        if key not in known:
            out = tmp_path_factory.mktemp("reference") / "out"
            prune(replace(work, out=out))
            known[key] = contents(out)
        return known[key]

    return call


def result(work: Job) -> dict[str, object]:
    """Run a job to its end; nothing is left beside the output."""
    assert work.out
    prune(work)
    assert os.listdir(work.out.parent) == [work.out.name]
    return contents(work.out)


Reference = Callable[[Job], dict[str, object]]
Stop = Callable[..., None]


@pytest.mark.parametrize("blocks", [1, BLOCKS - 1, BLOCKS])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_run_gives_the_same_bytes_and_runs_no_block_again(
    work: Job, reference: Reference, stop: Stop, blocks: int, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = replace(work, **recipe, evaluate=False)
    wanted = reference(work)
    stop(work, blocks)
    ran: set[int] = set()
    loaded: set[str] = set()
    forward, load = Block.forward, Skeleton.loaded

    def counted(block: Block, *rest: Any, **how: Any) -> Tensor:
        ran.add(block.index)
        return forward(block, *rest, **how)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(
        Skeleton, "loaded", lambda model, names, **how: (loaded.update(names), load(model, names, **how))[1]
    )
    assert result(work) == wanted
    assert ran == set(range(blocks, BLOCKS))
    # What is removed is planned before the run, with a look at the first block.
    planned = {0} if work.sparsity.startswith("channels") else set()
    assert {int(name.split(".")[2]) for name in loaded if name.startswith("model.layers.")} - planned == ran


def test_time_before_the_stop_counts(work: Job, stop: Stop) -> None:
    stop(work, BLOCKS)
    before = read_state(partial(work) / STATE)["report"]["seconds"]
    report = prune(work)
    assert {"solve", "error", "write", "prune", "total", "prepare", "dense_evaluation"} <= before.keys()
    assert all(report.seconds[stage] >= round(spent, 3) for stage, spent in before.items())
    assert len(report.blocks) == BLOCKS


def test_the_dense_model_is_measured_once(
    work: Job, reference: Reference, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reference(work)
    stop(work, 2)
    labels: list[str] = []
    monkeypatch.setattr(Progress, "start", lambda _, label, *__: labels.append(label))
    assert result(work) == wanted
    assert "pruned perplexity" in labels
    assert "dense perplexity" not in labels


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_hidden_states_in_files_change_nothing(
    work: Job, reference: Reference, stop: Stop, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = replace(work, **recipe, evaluate=False)
    wanted = reference(work)
    most = 0
    put = Filed.put

    def counting(filed: Filed, number: int, tensor: Tensor) -> None:
        nonlocal most
        put(filed, number, tensor)
        most = max(most, len(list(filed.path.parent.glob("pruned-*.bin"))))

    monkeypatch.setattr(Filed, "put", counting)
    assert result(replace(work, activation_memory=0)) == wanted
    assert most == 2
    # Nor does it matter where they were before the run was stopped.
    for before, after in ((0, 2**30), (2**30, 0)):
        shutil.rmtree(work.out or "")
        stop(replace(work, activation_memory=before), 2)
        assert result(replace(work, activation_memory=after)) == wanted


@toy_block
class Handing(nn.Module):
    """Hands what it computed to later blocks, in a dict that all of them are called with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, seen: dict[Any, Any]) -> tuple[Tensor, None]:
        y = self.up(x) + seen["last", 1][0] if seen else self.up(x)
        seen["last", 1] = (y, None)
        return x + self.down(y.relu()), None


class Handed(Toy):
    """Calls its blocks with a dict, or something else that holds one."""

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        seen = Seen() if self.config.kind == "Hidden" else {}
        for layer in self.layers:
            hidden = layer(hidden, seen)[0]
        return CausalLMOutput(logits=self.head(hidden))


class HandedConfig(ToyConfig):
    """Its config."""

    model_type = "toy-handed"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


Handed.config_class = HandedConfig
AutoConfig.register("toy-handed", HandedConfig)
AutoModelForCausalLM.register(HandedConfig, Handed)


class Seen:
    """State that nobody can save."""

    last: Tensor | None = None


@toy_block
class Hidden(Handing):
    """Hands it on in an object."""

    def forward(self, x: Tensor, seen: Seen) -> tuple[Tensor, None]:  # type: ignore[override]
        y = self.up(x) if seen.last is None else self.up(x) + seen.last
        seen.last = y
        return x + self.down(y.relu()), None


@pytest.mark.parametrize("memory", [0, 2**30])
def test_what_blocks_hand_to_later_ones_survives(
    work: Job, reference: Reference, stop: Stop, tmp_path_factory: pytest.TempPathFactory, memory: int
) -> None:
    folder = save_tiny("toy-handed", tmp_path_factory.mktemp("handing"), kind="Handing", tokenizer=False)
    work = replace(work, model=str(folder), method="auto", evaluate=False, activation_memory=memory)
    wanted = reference(work)
    stop(work, 1)
    assert result(work) == wanted


def test_a_run_that_cannot_be_saved_says_so_and_goes_on(work: Job, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_tiny("toy-handed", tmp_path_factory.mktemp("hidden"), kind="Hidden", tokenizer=False)
    told = Told()
    prune(replace(work, model=str(folder), evaluate=False), told)
    assert any("a block is called with Seen, which cannot be saved" in text for text in told.said)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "falcon", "qwen2_moe", "jamba", "gemma4_text"])
def test_every_kind_of_model_can_be_resumed(
    model_type: str, work: Job, reference: Reference, stop: Stop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = save_tiny(model_type, tmp_path_factory.mktemp(model_type), tokenizer=False)
    work = replace(work, model=str(folder), method="auto", evaluate=False)
    wanted = reference(work)
    stop(work, 2 if model_type == "gemma4_text" else 1)
    assert result(work) == wanted


# Another run


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": "1:4"}, "--sparsity was 2:4, now 1:4"),
    "method": ({"method": "wanda"}, "--method was sparsegpt, now wanda"),
    "option": ({"options": (("damping", "0.5"),)}, "--option was .*0.5"),
    "targets": ({"targets": "dense"}, "--targets was pruned, now dense"),
    "steps": ({"steps": 2}, "--steps was 1, now 2"),
    "reconstruct": ({"reconstruct": 1}, "--reconstruct was 0, now 1"),
    "ridge": ({"ridge": 0.3}, "--ridge was 0.0, now 0.3"),
    "own text": ({"self_calibration": 0.5}, "--self-calibration was 0.0, now 0.5"),
    "skip": ({"skip": ("*.q_proj",)}, "--skip was"),
    "dtype": ({"dtype": "bfloat16"}, "--dtype was None, now bfloat16"),
    "threads": ({"threads": 7}, r"--threads was \d+, now 7"),
    "bos": ({"bos": "yes"}, "--bos was no, now yes"),
    "samples": ({"samples": 3}, "calibration tokens was .*, now"),
    "no evaluation": ({"evaluate": False}, "evaluation tokens was .*, now None"),
}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stopped(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job's unfinished work."""
    return tmp_path_factory.mktemp("stopped")


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_change_that_would_alter_the_result_is_named_and_refused(
    work: Job, stop: Stop, stopped: Path, change: dict[str, Any], says: str
) -> None:
    work = replace(work, out=stopped / "out")
    if not partial(work).exists():
        stop(work, 2)
    before = listing(stopped)
    with pytest.raises(InputError, match=f"holds 2 finished blocks of another run: {says}") as refusal:
        prune(replace(work, **change))
    assert "--restart" in refusal.value.hint
    assert listing(stopped) == before


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_model_is_refused(work: Job, stop: Stop, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = shutil.copytree(work.model, tmp_path_factory.mktemp("other") / "model")
    work = replace(work, model=str(folder))
    stop(work, 2)
    before = listing(partial(work))
    edit_tensor(folder, "model.layers.3.mlp.up_proj.weight", lambda weight: weight.view(-1)[:1].add_(1))
    with pytest.raises(InputError, match=r"the model's weights was .*, now"):
        prune(work)
    assert listing(partial(work)) == before


def test_other_versions_are_refused(work: Job, stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(work, 2)
    monkeypatch.setattr("llmprune.pipeline.context.version", lambda name: "1.0")
    with pytest.raises(InputError, match=r"llmprune was .*, now 1\.0"):
        prune(work)


def test_what_does_not_matter_may_change(work: Job, reference: Reference, stop: Stop, tmp_path: Path) -> None:
    wanted = reference(work)
    stop(work, 2)
    assert result(replace(work, overwrite=True, activation_memory=1, seed=5)).keys() == wanted.keys()


def test_restart_drops_what_is_there(work: Job, reference: Reference, stop: Stop) -> None:
    stop(work, 2)
    other = replace(work, method="magnitude")
    assert result(replace(other, restart=True)) == reference(other)


# Damage


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
@pytest.mark.parametrize(
    "file", [STATE, "pruned-00002.bin", "state-00002.safetensors", "model/shard-00001.safetensors"]
)
def test_what_is_damaged_is_made_again(work: Job, reference: Reference, stop: Stop, file: str, damage: str) -> None:
    wanted = reference(work)
    stop(work, 2)
    path = partial(work) / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw if damage == "flipped" else raw[: len(raw) // 2])
    told = Told()
    prune(work, told)
    assert work.out
    assert contents(work.out) == wanted
    if file != STATE:
        assert any(f"{path} is damaged or missing: starting over" in text for text in told.said)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"state": {}}', "\x00"])
def test_rubbish_is_no_state(work: Job, reference: Reference, text: str) -> None:
    partial(work).mkdir()
    (partial(work) / LOCK).write_bytes(MARK)
    (partial(work) / STATE).write_text(text)
    (partial(work) / "shard-00001.safetensors").write_text("half")
    assert result(work) == reference(work)


TWO_FILES = 350_000
"""Bytes that hold the embeddings and two blocks, or two blocks."""


@pytest.mark.parametrize(
    ("place", "call"),
    [("pipeline.state.delete", n) for n in (1, 2, 4)] + [("model.writer.join_files", n) for n in (1, 2)],
)
def test_a_run_that_is_stopped_while_shards_are_joined_goes_on_there(
    work: Job, reference: Reference, place: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = replace(work, max_shard_size=TWO_FILES)
    wanted = reference(work)
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= wanted.keys()
    told = Told()
    module, _, name = f"llmprune.{place}".rpartition(".")
    real, calls = getattr(sys.modules[module], name), 0

    def stopping(first: Path | list[Path], *more: Any) -> None:
        nonlocal calls
        calls += "shard-" in str(first)
        if calls == call:
            raise Stopped
        real(first, *more)

    with monkeypatch.context() as patch:
        patch.setattr(f"llmprune.{place}", stopping)
        with pytest.raises(Stopped):
            prune(work)
    prune(work, told)
    assert work.out
    assert contents(work.out) == wanted
    assert any("4 blocks were finished before" in text for text in told.said)


def test_a_full_disk_while_shards_are_joined_keeps_all_blocks(
    work: Job, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.model.writer.join_files", full)
        with pytest.raises(PruneError, match=r"cannot write .*joined-00001.*No space left on device"):
            prune(work, told)
    assert any("4 of 4 blocks are finished and kept" in text for text in told.said)
    assert result(work) == reference(work)


def test_leftovers_of_the_block_at_hand_go(work: Job, reference: Reference, stop: Stop) -> None:
    stop(work, 2)
    for name in ("pruned-00003.bin", "model/shard-00009.safetensors", "model/shard-00009.tmp", "model/config.json"):
        (partial(work) / name).write_text("half")
    assert result(work) == reference(work)


# What happens to a machine


def test_a_full_disk_keeps_what_is_finished(work: Job, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    put = Filed.put

    def full(filed: Filed, number: int, tensor: Tensor) -> None:
        if filed.path.name == "pruned-00003.bin":
            raise OSError(28, "No space left on device")
        put(filed, number, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Filed, "put", full)
        with pytest.raises(PruneError, match=r"cannot write .*No space left on device") as failure:
            prune(work, told)
    assert failure.value.exit_code == 1
    assert "free disk space and run the same command again" in failure.value.hint
    assert any("2 of 4 blocks are finished and kept" in text for text in told.said)
    assert result(work) == reference(work)


@pytest.mark.parametrize(
    "writer", ["llmprune.streaming.cross_block_state.save_file", "llmprune.model.writer.save_file"]
)
def test_a_full_disk_is_named_whoever_writes(writer: str, work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        if "00003" in path.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(writer, full)
    with pytest.raises(PruneError, match=r"cannot write .*No space left on device") as failure:
        prune(work)
    assert "free disk space and run the same command again" in failure.value.hint
    assert read_state(partial(work) / STATE)["streams"][0]["done"] > 0


def test_a_failure_in_the_first_block_leaves_nothing(work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "export", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(work)
    assert work.out
    assert os.listdir(work.out.parent) == []


def test_two_processes_do_not_share_an_output(work: Job, reference: Reference, stop: Stop) -> None:
    stop(work, 2)
    before = listing(partial(work))
    with (partial(work) / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another llmprune is writing"):
            prune(work)
        assert listing(partial(work)) == before
    assert result(work) == reference(work)


KILLED = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path

import torch

from llmprune import Job, prune
from llmprune.reporting.report import FILE

torch.set_num_threads(1)
job = Job(**json.loads(sys.argv[1]))
job = replace(job, out=Path(job.out))
partial = job.out.with_name(f".{job.out.name}.partial")
seconds, chance = float(sys.argv[2]), random.Random(0)


def attempt(kill_at_write, longest):
    # A child process is killed: at some moment after it has begun to prune, or at its n-th touch of a file.
    child = os.fork()
    if child == 0:
        touched = 0

        def hook(event, arguments):
            nonlocal touched
            if event in {"open", "os.rename", "os.remove"} and str(arguments[0]).startswith(str(partial)):
                touched += 1
                if touched == kill_at_write:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_at_write:
            sys.addaudithook(hook)
        prune(job)
        os._exit(0)
    if not kill_at_write:
        while not list(partial.glob("model/shard-*")) and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass


def done():
    state = partial / "state.json"
    return json.loads(state.read_text())["state"]["streams"][0]["done"] if state.exists() else 0


begun, finished = time.monotonic(), []
kills, longest = 0, 0.25
while time.monotonic() - begun < seconds:
    stages = set()
    while not job.out.exists():
        before = done()
        attempt(0 if chance.random() < 0.6 else chance.randrange(2, 40), longest)
        kills += 1
        stages.add(done())
        # On a busy machine a block takes longer.
        longest *= 1.2 if done() == before else 1
    finished.append(sorted(stages))
    job.out.rename(job.out.with_name(f"finished-{len(finished)}"))
print(json.dumps({"kills": kills, "stages": finished}))
"""


def test_a_run_that_is_killed_again_and_again_gives_the_same_bytes(work: Job, reference: Reference) -> None:
    # The process forks, which a pool of threads does not outlive.
    threads, work = torch.get_num_threads(), replace(work, threads=1)
    wanted = reference(work)
    torch.set_num_threads(threads)
    assert work.out
    fields = {"model": work.model, "sparsity": work.sparsity, "method": work.method, "calib": work.calib, "threads": 1}
    fields |= {"out": str(work.out), "device": "cpu", "eval_text": work.eval_text}
    fields |= {"eval_windows": work.eval_windows, "eval_context": work.eval_context}
    command = [sys.executable, "-c", KILLED, json.dumps(fields), "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    folders = list(work.out.parent.glob("finished-*"))
    assert folders
    for folder in folders:
        assert contents(folder) == wanted, told
    assert {stage for stages in told["stages"] for stage in stages} >= {1, 2, 3}
    assert told["kills"] > 3 * len(folders)
