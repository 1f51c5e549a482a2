"""Pruning and distilling by turns: every path ends at the same ratio of the dense model, with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import gradual, record
from llmprune import PruneReport
from llmprune.errors import InputError


@pytest.mark.parametrize(
    ("step", "before", "wanted"),
    [
        ("channels:25%", None, "channels:25%"),
        ("channels:40%", "channels:25%", "channels:20%"),
        ("channels:50%", "channels:40%", "channels:16.67%"),
        ("60%", "50%", "60%"),
        ("2:4", None, "2:4"),
    ],
)
def test_what_a_step_removes_behind_another(step: str, before: str | None, wanted: str) -> None:
    assert gradual.further(step, before) == wanted


@pytest.mark.parametrize(
    ("step", "before"),
    [("channels:25%", "channels:40%"), ("heads:50%", "channels:40%"), ("blocks:1", None), ("size:75%", None)],
)
def test_what_is_no_step_is_refused(step: str, before: str | None) -> None:
    with pytest.raises(InputError):
        gradual.further(step, before)


def test_a_study(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "changes", list)
    words = [str(tiny), "channels:25%", "channels:50%", "--tokens", "128", "--calib", str(text), "--samples", "4"]
    words += ["--seq-len", "16", "--work", str(tmp_path / "work"), "--text", str(text), "--windows", "3"]
    words += ["--context", "32", "--out", str(tmp_path / "result.json")]
    assert gradual.main([*words, "--", "--learning-rate", "1e-3", "--held-out", "2"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    paths = result["paths"]
    assert [len(paths[name]) for name in ("gradual", "at once")] == [2, 1]
    assert [sum(stage["tokens"] for stage in path) for path in paths.values()] == [128, 128]
    assert paths["gradual"][-1]["parameters"] == paths["at once"][-1]["parameters"]
    assert PruneReport.read(tmp_path / "work" / "gradual-2-distilled").distillation["teacher"] == tiny.name
    assert str(tmp_path) not in json.dumps(result)
    assert len(gradual.table(result).splitlines()) == 7
