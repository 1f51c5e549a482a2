"""`size:75%`: blocks, heads and channels are chosen together, and the run goes on as if they had been asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    job,
    on_disk,
    random_tokens,
    reload,
    save_tiny,
    stopped_behind_the_first_block,
    token_file,
)

from llmprune import InputError, PruneReport, prune
from llmprune.cli.terminal import summary
from llmprune.pipeline import size_choice
from llmprune.progress import Progress
from llmprune.run import dry_run


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def sized(work: Path, sparsity: str = "size:75%", progress: Progress | None = None, **options: Any) -> PruneReport:
    return prune(asked(work, sparsity, **options), progress)


def asked(work: Path, sparsity: str = "size:75%", model_type: str = "llama", **options: Any) -> Any:
    source = work / "source"
    if not source.exists():
        save_tiny(model_type, source, num_hidden_layers=4)
    tokens = options.pop("calib", None) or token_file(work / "tokens.safetensors", random_tokens(8, 32))
    return job(source, options.pop("out", work / "out"), tokens, sparsity, **options)


def block_parameters(folder: Path) -> int:
    return sum(value.numel() for name, value in on_disk(folder).items() if ".layers." in name)


@pytest.mark.parametrize("percent", [90, 75, 50])
def test_no_more_is_left_than_was_asked_for(percent: int, tmp_path: Path) -> None:
    told = Told()
    report = sized(tmp_path, f"size:{percent}%", told)
    left = block_parameters(tmp_path / "out") / block_parameters(tmp_path / "source")
    assert percent / 100 - 0.1 < left <= percent / 100 + 0.0005
    assert report.sparsity["asked"] == f"size:{percent}%"
    assert report.sparsity["removed"][0] == f"size:{percent}%: {left:.1%} of the block parameters left"
    assert report.sparsity["pattern"] in next(text for text in told.said if "divergence" in text)
    assert f"size:{percent}%" in summary(report)
    assert reload(tmp_path / "out")(random_tokens(1, 8)).logits.isfinite().all()


def test_it_is_the_run_of_what_was_chosen(tmp_path: Path) -> None:
    report = sized(tmp_path, "size:70%+2:4", quantize="int8")
    named = sized(tmp_path, report.sparsity["pattern"], quantize="int8", out=tmp_path / "named")
    assert report.sparsity["pattern"].endswith("+2:4")
    assert named.layers == report.layers
    for name, value in on_disk(tmp_path / "out").items():
        assert torch.equal(on_disk(tmp_path / "named")[name], value)


def test_numbers_of_channels_are_rounded_as_asked_for(tmp_path: Path) -> None:
    # The usual multiple here is 8, so 112 of 128 channels would be left.
    sized(tmp_path, "size:92%", round_to=20)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 100


def test_a_choice_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(tmp_path)
    with stopped_behind_the_first_block(monkeypatch):
        sized(tmp_path, out=tmp_path / "again")

    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(size_choice, "size_errors", never)
    told = Told()
    sized(tmp_path, out=tmp_path / "again")
    for name, value in on_disk(tmp_path / "out").items():
        assert torch.equal(on_disk(tmp_path / "again")[name], value)
    sized(tmp_path, progress=told)
    assert any("done already" in text for text in told.said)
    with pytest.raises(InputError, match="exists already"):
        sized(tmp_path, "size:80%")


def test_the_plan_counts_a_removal_of_that_size(tmp_path: Path) -> None:
    plan = dry_run(asked(tmp_path, "size:75%"))
    assert plan["sparsity"]["asked"] == "size:75%"
    assert plan["size"]["pruned"] < plan["size"]["dense"]
    assert not (tmp_path / "out").exists()
    plan = dry_run(asked(tmp_path, "size:75%+2:4", out=None, method="admm"))
    assert plan["out"].endswith("-size75pct-2of4")


@pytest.mark.parametrize(
    ("sparsity", "model_type", "options", "message"),
    [
        ("size:1%", "llama", {}, "less than can be left"),
        ("size:75%", "mixtral", {}, "has experts"),
        ("size:75%", "gemma2", {}, "do not add to the residual stream"),
        ("size:75%", "llama", {"permute": True}, "--permute does not apply"),
        ("size:75%", "llama", {"method": "sparsegpt"}, "--method sparsegpt"),
        ("size:75%", "llama", {"method": "influence"}, "--method influence does not apply"),
        ("size:75%", "llama", {"targets": "pruned", "refit": True}, "--targets pruned"),
        ("size:75%", "llama", {"only": ("*mlp*",)}, "--only"),
        ("size:75%", "llama", {"calib": "nothing.txt"}, "nothing.txt"),
        ("size:75%", "llama", {"samples": 1}, "it needs 2, there is 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    sparsity: str, model_type: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        sized(tmp_path, sparsity, model_type=model_type, **options)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_the_report_is_read_back(tmp_path: Path) -> None:
    report = sized(tmp_path)
    assert PruneReport.read(tmp_path / "out").sparsity == report.sparsity
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(config[key] == value for key, value in report.sparsity["config"].items())
