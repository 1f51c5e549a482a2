"""The study of a distillation measures three models, and records its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import job

from eval import distill, record
from llmprune import prune


def test_the_undone_fraction_is_one_where_the_dense_model_is_reached() -> None:
    found = {"dense": 20.0, "pruned": 40.0, "distilled": 20.0}
    assert distill.undone({name: {"text": {"value": value}} for name, value in found.items()}) == {"text": 1.0}


def test_a_study(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "changes", list)
    prune(job(tiny, tmp_path / "pruned", text, effort="fast", samples=4, seq_len=32))
    words = [str(tmp_path / "pruned"), "--work", str(tmp_path), "--dense", str(tiny), "--text", str(text)]
    words += ["--windows", "3", "--context", "32", "--out", str(tmp_path / "result.json")]
    flags = ["--calib", str(text), "--seq-len", "16", "--tokens", "256", "--no-eval", "--learning-rate", "3e-3"]
    assert distill.main([*words, "--", *flags]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["perplexity"].keys() == {"dense", "pruned", "distilled"}
    assert result["undone"].keys() == {text.name}
    assert result["distillation"]["tokens"] == 256
    assert str(tmp_path) not in json.dumps(result)
    assert [line.split(" | ")[0] for line in distill.table(result).splitlines()[2:6]] == [
        "| dense",
        "| pruned",
        "| distilled",
        "| undone",
    ]
    assert json.loads(capsys.readouterr().out) == result
