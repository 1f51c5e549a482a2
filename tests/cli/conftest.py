"""The command line run in this process, and a small job."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, listing

from llmprune.cli.main import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process and in an empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def flags(tiny: Path, text: Path) -> list[str]:
    """A whole small job."""
    small = ["--samples", "4", "--seq-len", "32", "--eval-windows", "3", "--eval-context", "32"]
    return ["--model", str(tiny), "--sparsity", "2:4", "--calib", str(text), "--eval", str(text), *small]


@pytest.fixture
def refused(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run a job that must be refused: exit code 2, one error, one hint, an empty stdout, and nothing written."""

    def call(*arguments: object, says: str = "", hints: str = "", code: int = 2) -> Outcome:
        before = listing(Path.cwd())
        result = run(*arguments)
        assert result.code == code, result
        error, hint = result.line("error: "), result.line("hint: ")
        assert re.search(says, error), error
        assert re.search(hints, hint), hint
        assert result.err.endswith(f"{error}\n{hint}\n")
        assert "Traceback" not in result.err
        assert result.out == ""
        assert listing(Path.cwd()) == before
        return result

    return call


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")
