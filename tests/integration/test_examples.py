"""The examples run as they stand, and a notebook shows what happens."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from llmprune import Job, ProgressBars, PruneReport, prune

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    settings = {"MODEL": str(tiny), "TEXT": str(text), "OTHER_TEXT": str(text), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(example)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2
    for folder in tmp_path.glob("pruned-*"):
        assert PruneReport.read(folder).evaluation


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_notebook_of_cells(example: Path) -> None:
    cells = example.read_text(encoding="utf-8").split("# %%")
    assert cells[0] == ""
    assert cells[1].startswith(" [markdown]\n# # ")
    assert len(cells) > 5


def test_bars_tell_every_stage_and_end(tiny: Path, text: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    small = {"samples": 2, "seq_len": 16, "eval_windows": 2, "eval_context": 16}
    job = Job(str(tiny), "2:4", "wanda", calib=str(text), eval_text=str(text), out=tmp_path / "o", **small)  # type: ignore[arg-type]
    prune(job, ProgressBars(file=shown, mininterval=0))
    for stage in ("checking weights", "dense perplexity", "pruning", "verifying", "pruned perplexity"):
        last = [line for line in shown.getvalue().replace("\n", "\r").split("\r") if line.startswith(stage)][-1]
        assert "100%" in last
    assert "error 0." in shown.getvalue()
    assert ".o.partial until everything is done" in shown.getvalue()


def test_a_notebook_shows_a_report_as_a_table(tiny: Path, text: Path, tmp_path: Path) -> None:
    job = Job(str(tiny), "2:4", "wanda", calib=str(text), samples=2, seq_len=16, evaluate=False, out=tmp_path / "<o>")
    report = prune(job)
    shown = report._repr_html_()
    assert "2:4, prunes 2 of every 4 weights" in shown
    assert "&lt;o&gt;" in shown
    assert "perplexity" not in shown
    report.evaluation = {
        "source": "a/b.txt",
        "dense": {"value": 2, "error": 0},
        "pruned": {"value": 3.21, "error": 0.1},
    }
    assert "3.21 ± 0.10" in report._repr_html_()
