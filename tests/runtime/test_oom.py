"""Where the device has no room for a batch, a run goes on with smaller ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import job, random_tokens, reload, save_tiny, text_file
from torch import Tensor, nn

from llmprune import Job, prune
from llmprune.errors import PruneError
from llmprune.progress import Progress
from llmprune.runtime.oom import smaller_batch, with_oom_retry
from llmprune.sources.tokens import save_tokens, token_batch
from llmprune.streaming.batch import Call

WINDOWS, BLOCKS = 12, 3


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def work(tmp_path: Path) -> Job:
    """A job whose calibration text is one batch."""
    save_tiny("llama", tmp_path / "model", num_hidden_layers=BLOCKS)
    save_tokens(token_batch(random_tokens(WINDOWS), "random", 0), tmp_path / "tokens.safetensors")
    text_file(tmp_path / "eval.txt", 300)
    evaluation = {"evaluate": True, "eval_text": str(tmp_path / "eval.txt"), "eval_windows": 3, "eval_context": 32}
    return job(tmp_path / "model", tmp_path / "out", tmp_path / "tokens.safetensors", **evaluation)


def refuse(monkeypatch: pytest.MonkeyPatch, most: int, calls: list[int], after: int = 0) -> None:
    """Let blocks run out of memory on more than so many windows, from a certain call on."""
    run = Call.run

    def limited(self: Call, block: nn.Module, hidden: Tensor) -> Any:
        calls.append(len(hidden))
        if len(hidden) > most and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, block, hidden)

    monkeypatch.setattr(Call, "run", limited)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_run_goes_on_with_smaller_batches(method: str, work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(work, method=method, evaluate=False)
    assert work.out
    prune(replace(work, out=work.out.with_name("roomy")))
    calls: list[int] = []
    told = Told()
    with monkeypatch.context() as patch:
        refuse(patch, 4, calls)
        prune(work, told)
    assert [said for said in told.said if "memory" in said] == [
        f"out of memory on the device: going on with {windows} of the text's windows at a time" for windows in (6, 3)
    ]
    wanted = reload(work.out.with_name("roomy")).state_dict()
    for name, tensor in reload(work.out).state_dict().items():
        assert torch.equal(tensor == 0, wanted[name] == 0)
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-5)


def test_finished_blocks_stay(work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(work, evaluate=False)
    counted: list[int] = []
    with monkeypatch.context() as patch:
        refuse(patch, WINDOWS, counted)
        report = prune(replace(work, out=work.out and work.out.with_name("roomy")))
    calls: list[int] = []
    with monkeypatch.context() as patch:
        # Memory ends in the last block.
        refuse(patch, WINDOWS // 2, calls, after=len(counted) - 1)
        again = prune(work)
    # Twice as many batches, but of the last block alone.
    assert len(calls) <= len(counted) * (1 + 2 / BLOCKS)
    assert [layer.name for layer in again.layers] == [layer.name for layer in report.layers]
    assert len(again.blocks) == len(report.blocks) == BLOCKS


def test_an_evaluation_goes_on_with_smaller_batches(work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = prune(replace(work, out=work.out and work.out.with_name("roomy")))
    refuse(monkeypatch, 1, [])
    tight = prune(work)
    assert roomy.evaluation
    assert tight.evaluation
    assert tight.evaluation["dense"]["value"] == pytest.approx(roomy.evaluation["dense"]["value"])


def test_one_window_that_is_too_much_is_an_error(work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 0, [])
    with pytest.raises(PruneError, match="one window at a time is more than") as caught:
        prune(replace(work, evaluate=False))
    assert "--seq-len" in caught.value.hint


def test_other_errors_are_left_alone() -> None:
    def attempt(windows: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        with_oom_retry(attempt, 4, Progress())


@pytest.mark.parametrize(("windows", "wanted"), [(2, 1), (3, 1), (4, 2), (6, 3), (9, 3), (13, 1), (16, 8)])
def test_a_batch_is_cut_into_equal_parts(windows: int, wanted: int) -> None:
    assert smaller_batch(windows) == wanted
