"""The output folder: what is refused, replaced, resumed and left alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import REPORT, Disk, Outcome, execute, listing, with_value
from helpers import edit_tensor

from llmprune.runtime.ownership import LOCK, MARK


def test_an_output_below_a_file_is_refused(refused: Callable[..., Outcome], flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(*flags, "--out", tmp_path / "file" / "out", says="cannot write below", hints="--out")
    refused(*flags, "--out", tmp_path / "file" / "deep" / "out", says="cannot write below", hints="--out")
    refused(*flags, "--out", tmp_path / "file", "--overwrite", says="is a file", hints="--out")
    refused(*flags, "--out", "/", "--overwrite", says="no usable path", hints="--out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/x", "x" * 300, "x" * 250, "a\0b"])
def test_an_output_that_cannot_be_made_is_refused(refused: Callable[..., Outcome], flags: list[str], out: str) -> None:
    refused(*flags, "--out", out, hints="--out")


def test_a_folder_of_others_is_never_replaced(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(
        *flags, "--out", tmp_path / "mine", "--overwrite", says="not written by llmprune", hints="nothing was touched"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_model_itself_is_never_the_output(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], copy: Path
) -> None:
    before = listing(copy)
    refused(*with_value(flags, "--model", copy), "--out", copy, "--overwrite")
    assert listing(copy) == before
    assert run(*flags, "--out", "pruned").code == 0
    refused(*with_value(flags, "--model", "pruned"), "--out", "./pruned", "--overwrite", says="is the model itself")


def test_a_complete_output_is_refused_then_replaced(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], copy: Path, text: Path
) -> None:
    assert run(*flags, "--method", "magnitude", "--out", "out").code == 0
    before = listing(Path("out"))
    refused(*flags, "--out", "out", says="exists already", hints="--overwrite")
    # Whatever goes wrong with --overwrite, the old folder stays as it was.
    refused(*with_value(flags, "--samples", 10**6), "--out", "out", "--overwrite")
    edit_tensor(copy, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.mul_(1e38))
    refused(*with_value(flags, "--model", copy), "--out", "out", "--overwrite", says="NaN or Inf")
    assert listing(Path("out")) == before
    assert run(*flags, "--method", "wanda", "--out", "out", "--overwrite").code == 0
    assert json.loads(Path("out", REPORT).read_text())["method"]["name"] == "wanda"
    assert os.listdir() == ["out"]


def test_an_output_behind_a_link_is_replaced_without_leftovers(run: Callable[..., Outcome], flags: list[str]) -> None:
    assert run(*flags, "--out", "real").code == 0
    Path("link").symlink_to("real")
    assert run(*flags, "--out", "link", "--overwrite").code == 0
    assert Path("link", REPORT).exists()
    assert sorted(os.listdir()) == ["link", "real"]


def test_a_stopped_run_goes_on_and_says_so(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.run.verify_written", lambda *_: 1 / 0)
        assert run(*flags, "--out", "out").code == 1
    refused(*flags, "--out", "out", "--skip", "*.q_proj", says="2 finished blocks of another run", hints="--restart")
    result = run(*flags, "--out", "out")
    assert result.code == 0
    assert "2 blocks were finished before" in result.err
    assert os.listdir() == ["out"]


def test_restart_drops_the_finished_blocks(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.run.verify_written", lambda *_: 1 / 0)
        assert run(*flags, "--out", "out").code == 1
    result = run(*flags, "--out", "out", "--skip", "*.q_proj", "--restart")
    assert result.code == 0
    assert "finished before" not in result.err


def test_the_rest_of_a_killed_run_is_removed(run: Callable[..., Outcome], flags: list[str]) -> None:
    Path(".out.partial").mkdir()
    Path(".out.partial", LOCK).write_bytes(MARK)
    Path(".out.partial", "model").mkdir()
    Path(".out.partial", "model", "shard-00001.safetensors").write_text("half")
    result = run(*flags, "--out", "out")
    assert result.code == 0
    assert ".out.partial" in result.err
    assert os.listdir() == ["out"]


def test_an_empty_folder_may_become_the_output(run: Callable[..., Outcome], flags: list[str]) -> None:
    Path("out").mkdir()
    assert run(*flags, "--out", "out").code == 0
    assert os.listdir() == ["out"]


def test_a_full_disk_is_found_before_anything_is_written(
    refused: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - 1000, 1000))
    refused(*flags, says="needs 32 MiB, but .* has 0 MiB free", hints="free disk space")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, less than the tiny model takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if execute(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], tmp_path).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    assert execute(["umount", str(folder)], tmp_path).returncode == 0


def test_a_small_disk_is_refused(
    refused: Callable[..., Outcome], flags: list[str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(*flags, "--out", small_disk / "out", says="MiB free", hints="free disk space")
    # A disk that fills up meanwhile is the run's failure, not the user's.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 0, 10**12))
    refused(*flags, "--out", small_disk / "out", says="cannot write", hints="free disk space", code=1)
    assert os.listdir(small_disk) == []
