"""Nobody's files are lost: what no run of ours wrote is refused, and what is published names no place."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import job, save_tiny, token_file

from llmprune import Job, PruneReport, prune
from llmprune.errors import InputError, Interrupted, PruneError
from llmprune.pipeline import workdir
from llmprune.pipeline.state import STATE, RunState, read_state
from llmprune.progress import Progress
from llmprune.reporting.html_report import PAGE
from llmprune.reporting.report import FILE
from llmprune.runtime.ownership import LOCK, MARK

MINE = "years of work"
BLOCKS = 4


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of four blocks and tokens to calibrate on."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny("llama", folder / "model", num_hidden_layers=BLOCKS)
    token_file(folder / "tokens.safetensors")
    return folder


@pytest.fixture
def work(given: Path, tmp_path: Path) -> Job:
    """A job that takes part of a second."""
    return job(given / "model", tmp_path / "out", given / "tokens.safetensors", method="magnitude")


@pytest.fixture(scope="module")
def done(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that job."""
    out = tmp_path_factory.mktemp("done") / "out"
    prune(job(given / "model", out, given / "tokens.safetensors", method="magnitude"))
    return out


def listing(folder: Path) -> dict[str, object]:
    """All that is in a folder: files with their bytes, links with where they lead, folders."""

    def seen(path: Path) -> object:
        return os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {path.relative_to(folder).as_posix(): seen(path) for path in sorted(folder.rglob("*"))}


def refused(work: Job, says: str, hints: str) -> None:
    """The job is refused with these words, and leaves everything beside its output as it was."""
    assert work.out
    before = listing(work.out.parent)
    with pytest.raises(InputError, match=says) as refusal:
        prune(work)
    assert hints in refusal.value.hint
    assert listing(work.out.parent) == before


# The working directory and what else lies beside the output


def mine(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text(MINE)
    return folder


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to nowhere", "link inside", "state and lock"])
def test_a_working_directory_that_is_not_ours_is_refused(work: Job, tmp_path: Path, kind: str) -> None:
    partial = tmp_path / ".out.partial"
    if kind == "folder":
        mine(partial)
    elif kind == "file":
        partial.write_text(MINE)
    elif kind == "link":
        partial.symlink_to(mine(tmp_path / "mine"))
    elif kind == "link to nowhere":
        partial.symlink_to("nowhere")
    elif kind == "link inside":
        mine(tmp_path / "mine")
        partial.mkdir()
        (partial / LOCK).write_bytes(MARK)
        (partial / "model").symlink_to("../mine")
    else:
        mine(partial)
        for name in (LOCK, STATE):
            (partial / name).write_text("{}")
    for changes in ({}, {"restart": True}, {"overwrite": True}):
        refused(replace(work, **changes), r"\.out\.partial (is|was|holds)", "move yours away")


def test_a_link_among_finished_blocks_is_not_followed(
    work: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.run.verify_written", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(work)
    # To free the disk, say.
    (tmp_path / ".out.partial" / "model").rename(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text(MINE)
    (tmp_path / ".out.partial" / "model").symlink_to(tmp_path / "mine")
    refused(work, "holds 'model', which is a link", "move yours away")


@pytest.mark.parametrize("name", [".out.old", ".out.new", ".out", "out.tmp", "prune_report.tmp", ".out.partial.old"])
@pytest.mark.parametrize("again", [False, True])
def test_what_else_lies_beside_the_output_stays(work: Job, done: Path, tmp_path: Path, name: str, again: bool) -> None:
    mine(tmp_path / name)
    if again:
        shutil.copytree(done, tmp_path / "out")
    prune(replace(work, overwrite=again, method="wanda"))
    assert sorted(os.listdir(tmp_path)) == sorted([name, "out"])
    assert listing(tmp_path / name) == {"thesis.txt": MINE.encode()}


# What --overwrite replaces


def test_only_what_a_run_wrote_is_replaced(work: Job, done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    work = replace(work, overwrite=True, method="wanda")
    spoils: dict[str, Callable[[Path], object]] = {
        "notes.txt": lambda path: path.write_text(MINE),
        "checkpoint-1/model.safetensors": lambda path: (path.parent.mkdir(), path.write_text(MINE)),
        ".git/config": lambda path: (path.parent.mkdir(), path.write_text(MINE)),
        "link": lambda path: path.symlink_to(done),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "pipe": os.mkfifo,
    }
    for name, spoil in spoils.items():
        spoil(out / name)
        with pytest.raises(InputError, match=f"holds '{name}', which no run of llmprune wrote") as refusal:
            prune(work)
        assert "nothing was touched" in refusal.value.hint
        top = out / name.partition("/")[0]
        shutil.rmtree(top) if top.is_dir() and not top.is_symlink() else top.unlink()
    # A link in place of a file that a run wrote.
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    refused(work, r"holds 'config\.json', which no run", "move it away")
    (out / "config.json").unlink()
    (out / "speed.json").write_text("{}")
    prune(work)
    assert os.listdir(tmp_path / "out") != []
    assert PruneReport.read(out).method["name"] == "wanda"
    assert not (out / "speed.json").exists()


def test_a_folder_that_holds_the_model_is_not_replaced(work: Job, done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    shutil.copytree(work.model, out / "dense")
    refused(replace(work, model=str(out / "dense"), overwrite=True), "holds 'dense/config.json' and", "move it away")


def test_a_report_alone_makes_no_folder_ours(work: Job, done: Path, tmp_path: Path) -> None:
    shutil.copy(done / FILE, mine(tmp_path / "out") / FILE)
    refused(replace(work, overwrite=True), r"holds 'thesis\.txt'", "move it away")
    (tmp_path / "out" / FILE).write_text("{")
    refused(replace(work, overwrite=True), "no report of llmprune", "")


def test_a_folder_of_an_older_version_is_replaced_if_it_holds_what_that_wrote(
    work: Job, done: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    report = json.loads((out / FILE).read_text())
    del report["files"], report["fingerprint"]
    (out / FILE).write_text(json.dumps(report))
    (out / "train.py").write_text(MINE)
    work = replace(work, overwrite=True)
    refused(work, r"holds 'train\.py'", "move it away")
    (out / "train.py").unlink()
    refused(replace(work, overwrite=False), "exists already", "--overwrite")
    prune(work)
    assert PruneReport.read(out).files


def test_what_a_user_puts_in_place_of_the_output_meanwhile_stays(
    work: Job, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overwrite, place in ((False, tmp_path / "out"), (True, tmp_path / "out" / "mine")):
        if overwrite:
            shutil.copytree(done, tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr("llmprune.run.verify_written", lambda *_, place=place: mine(place))
            with pytest.raises(PruneError, match=r"exists|holds 'mine/thesis\.txt'") as failure:
                prune(replace(work, overwrite=overwrite, method="wanda"))
        assert failure.value.exit_code == 1
        assert (place / "thesis.txt").read_text() == MINE
        shutil.move(place, tmp_path / "mine")
        # All blocks are finished and kept.
        prune(replace(work, overwrite=overwrite, method="wanda"))
        assert sorted(os.listdir(tmp_path)) == ["mine", "out"]
        shutil.rmtree(tmp_path / "mine")
        shutil.rmtree(tmp_path / "out")


def test_a_mount_point_is_refused_before_the_work(work: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    refused(work, "out is a mount point", "--out")


# What is published


def test_no_place_on_this_machine_is_in_what_is_written(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "home of ada" / "secret-project"
    shutil.copytree(given / "model", place / "models" / "tiny")
    (place / "models" / "tiny" / "README.md").write_text(f"---\nbase_model: {place}/base\nlicense: mit\n---\n")
    for name, setting in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        settings = json.loads((place / "models" / "tiny" / name).read_text())
        settings |= {setting: f"{place}/models/base", "inner": [{"tokenizer_file": "../models/tokenizer.json"}]}
        (place / "models" / "tiny" / name).write_text(json.dumps(settings))
    shutil.copy(given / "tokens.safetensors", place)
    words = " ".join(f"w{number % 90}" for number in range(1000))
    (place / "texts").mkdir()
    (place / "texts" / "eval.txt").write_text(words)
    monkeypatch.chdir(place / "texts")
    command = [
        "llmprune", "--model=../models/tiny", "--sparsity", "2:4", "--calib", str(place / "tokens.safetensors"),
        "--eval", "../texts/eval.txt", "--output-dir", "x", "--out", f"{place}/made/out", "--skip", "*.q_proj",
        "--push-to-hub", "me/tiny", "--cache-dir", f"{place}/cache",
    ]  # fmt: skip
    work = Job(
        "../models/tiny", "2:4", "magnitude", calib=str(place / "tokens.safetensors"), eval_text="../texts/eval.txt",
        eval_windows=2, eval_context=32, out=place / "made" / "out", command=shlex.join(command),
    )  # fmt: skip
    report = prune(work)
    assert report.out == str(place / "made" / "out")
    for name in (FILE, PAGE, "README.md", "config.json", "tokenizer_config.json"):
        text = (place / "made" / "out" / name).read_text()
        for leak in ("secret-project", "home of ada", "home%20of", "models/", "texts/", "made/", str(tmp_path)):
            assert leak not in text, (name, leak)
    written = json.loads((place / "made" / "out" / FILE).read_text())
    config = json.loads((place / "made" / "out" / "config.json").read_text())
    assert (config["_name_or_path"], config["inner"]) == ("base", [{"tokenizer_file": "tokenizer.json"}])
    assert written["model"]["name"] == "tiny"
    assert written["out"] == "out"
    assert written["evaluation"]["source"] == "eval.txt"
    assert written["calibration"]["source"] == "tokens.safetensors (random ids)"
    assert written["command"] == (
        "llmprune --model=tiny --sparsity 2:4 --calib tokens.safetensors --eval eval.txt --output-dir x --out out "
        "--skip '*.q_proj' --push-to-hub me/tiny --cache-dir cache"
    )


# Whoever stops a run


def test_a_source_that_cannot_be_read_for_a_moment_costs_no_finished_block(
    work: Job, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(given / "model", tmp_path / "model"))
    work = replace(work, model=str(model))
    commit = RunState.commit

    def away(state: RunState, *rest: Any) -> None:
        commit(state, *rest)
        if state.blocks == 3:
            (model / "model.safetensors").rename(tmp_path / "away")

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "commit", away)
        with pytest.raises(PruneError, match="cannot be read") as failure:
            prune(work)
    assert failure.value.exit_code == 1
    assert read_state(tmp_path / ".out.partial" / STATE)["streams"][0]["done"] == 3
    (tmp_path / "away").rename(model / "model.safetensors")
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: said.append(text))
    prune(work)
    assert any("3 blocks were finished before" in text for text in said)


def test_the_same_command_again_ends_at_once_and_another_is_refused(
    work: Job, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    before = listing(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: said.append(text))
    report = prune(work)
    assert any("done already" in text for text in said)
    assert replace(report, out="out") == PruneReport.read(out)
    assert report.out == str(out)
    for change, says in (
        ({"method": "wanda"}, "exists already: --method was magnitude, now wanda"),
        ({"sparsity": "1:4"}, "exists already$"),
        ({"dtype": "bfloat16"}, "exists already: --dtype was None, now bfloat16"),
        ({"samples": 3}, "exists already: calibration tokens was"),
    ):
        refused(replace(work, **change), says, "--overwrite")
    assert listing(tmp_path) == before
    weights = next(out.glob("*.safetensors"))
    weights.unlink()
    refused(work, f"exists already, but lacks {weights.name}", "--overwrite")


def test_another_model_of_the_same_name_is_another_command(work: Job, given: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    other = save_tiny("llama", tmp_path / "other" / "model", num_hidden_layers=BLOCKS, seed=1)
    refused(replace(work, model=str(other)), "exists already: the model's weights was", "--overwrite")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_behind_the_rename_says_that_the_output_is_complete(
    work: Job, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        shutil.copytree(done, tmp_path / "out")
    work = replace(work, overwrite=overwrite, method="wanda")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("sync", "remove"):
        with monkeypatch.context() as patch:
            patch.setattr(workdir, name, interrupt)
            with pytest.raises(Interrupted, match=f"interrupted, but {tmp_path / 'out'} is complete") as stop:
                prune(work)
        assert stop.value.exit_code == 130
        assert PruneReport.read(tmp_path / "out").seconds["total"] > 0
        before = listing(tmp_path / "out")
        prune(work)
        assert listing(tmp_path / "out") == before
        assert os.listdir(tmp_path) == ["out"]
        if overwrite:
            prune(replace(work, method="magnitude"))
        else:
            shutil.rmtree(tmp_path / "out")


def test_an_interruption_between_two_renames_puts_the_old_folder_back(
    work: Job, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "out")
    before = listing(tmp_path / "out")
    rename = os.replace

    def interrupt(old: Path, new: Path) -> None:
        if new == tmp_path / "out" and old.name == "model":
            raise KeyboardInterrupt
        rename(old, new)

    work = replace(work, overwrite=True, method="wanda")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(work)
    assert listing(tmp_path / "out") == before
    # A kill leaves no time for that; the next run does it, whatever it is.
    os.replace(tmp_path / "out", tmp_path / ".out.partial" / workdir.REPLACED)
    with pytest.raises(InputError, match="exists already"):
        prune(replace(work, overwrite=False, sparsity="1:4"))
    assert listing(tmp_path / "out") == before
    prune(work)
    assert os.listdir(tmp_path) == ["out"]
    assert PruneReport.read(tmp_path / "out").method["name"] == "wanda"
