"""A recorded result names the command and the commit that gave it, and no path of the machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from eval import expert_scale, peers, processes, record, scale, solvers, speed, structured_scale, sweep, zero_shot
from eval.record import changes
from llmprune.errors import InputError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own with one commit, which the writer takes for this one."""
    monkeypatch.setattr(record, "changes", changes)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "eval" / "results").mkdir(parents=True)
    for name in ("code.py", "eval/LOG.md", "eval/results/old.json", "README.md"):
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


PATHS = {
    "/root/w/scale": "scale",
    "/tmp/llmprune-x7/out/": "out",
    "/opt/my venv/bin/python3.11": "python3.11",
    "~/models/demo": "demo",
    r"C:\Users\me\model": "model",
    "file:///home/me/a.txt": "a.txt",
    "--out=/home/me/results/a.json": "--out=a.json",
    "/home/me/piqa.jsonl,/home/me/arc.jsonl": "piqa.jsonl,arc.jsonl",
    "c4:/home/me/c4.txt": "c4:c4.txt",
    "no file /var/x/a.txt, nor '/var/x/b.txt'": "no file a.txt, nor 'b.txt'",
    str(ROOT / "eval" / "results" / "a.json"): "eval/results/a.json",
    str(ROOT / ".venv" / "bin" / "python"): ".venv/bin/python",
    str(ROOT / ".." / "shared" / "a.txt"): "../shared/a.txt",
}
OTHERS = (
    "demo",
    "../shared/a.txt",
    "a/b",
    "https://host/a/b",
    "2:4",
    "50%",
    "tokens/s, XᵀX / tokens",
    "re:.*lm_head",
    "",
)


@pytest.mark.parametrize(("text", "left"), [*PATHS.items(), *((text, text) for text in OTHERS)])
def test_of_an_absolute_path_only_what_others_have_is_left(text: str, left: str) -> None:
    assert record.portable(text) == left


NAMES = st.text("abcxyz019_-.", min_size=1).filter(lambda name: set(name) != {"."})


@given(st.lists(NAMES, min_size=2, max_size=5), st.sampled_from(["{}", "--out={}", "{},{}", "see {} and {}", "'{}'"]))
def test_no_folder_of_the_machine_is_left_wherever_a_path_stands(names: list[str], frame: str) -> None:
    path = "/" + "/".join(names)
    assert record.portable(frame.replace("{}", path)) == frame.replace("{}", names[-1])


def test_paths_are_found_at_any_depth_and_nothing_else_changes() -> None:
    value: dict[str, Any] = {"a": [{"folder": "/root/x"}, ("/root/y", 1)], "b": 0.5, "c": None, "d": True}
    assert record.portable(value) == {"a": [{"folder": "x"}, ["y", 1]], "b": 0.5, "c": None, "d": True}


def test_a_clean_checkout_is_named_by_its_commit(checkout: Path) -> None:
    stamp = record.stamp(["python", "-m", "eval.speed", "/root/a b", "--out", "/root/c"], checkout / "out.json")
    assert stamp == record.Stamp("python -m eval.speed 'a b' --out c", git(checkout, "rev-parse", "HEAD")[:12])


def test_results_and_their_pages_may_differ_from_the_commit(checkout: Path) -> None:
    for name in ("eval/LOG.md", "eval/results/old.json", "README.md", "eval/results/new.json", "untracked.txt"):
        (checkout / name).write_text("second\n")
    assert record.stamp(["x"], checkout / "out.json").commit == git(checkout, "rev-parse", "HEAD")[:12]


@pytest.mark.parametrize("staged", [True, False])
def test_changed_code_is_not_recorded(checkout: Path, staged: bool) -> None:
    (checkout / "code.py").write_text("second\n")
    if staged:
        git(checkout, "add", "code.py")
    with pytest.raises(InputError, match=r"1 changed files, such as code\.py") as caught:
        record.stamp(["x"], checkout / "out.json")
    assert "commit or stash" in caught.value.hint
    assert record.stamp(["x"], None).commit is None


def test_without_a_checkout_the_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "changes", changes)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert str(record.stamp(["x"], tmp_path / "out.json").commit).startswith("llmprune ")
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert str(record.stamp(["x"], tmp_path / "out.json").commit).startswith("llmprune ")


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    found = record.write(out, record.Stamp("x", "y"), {"folder": "/root/a", "value": 1})
    assert found == json.loads(out.read_text()) == {"command": "x", "commit": "y", "folder": "a", "value": 1}
    assert record.write(None, record.Stamp("x", None), {}) == {"command": "x", "commit": None}
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_rows_are_added_behind_those_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.jsonl"
    assert record.rows(out) == []
    added = [record.append(out, record.Stamp("x", "y"), {"n": n, "text": "a\nb/\u2028é"}) for n in range(3)]
    assert record.rows(out) == added
    assert len(out.read_text(encoding="utf-8").split("\n")) == 4


def test_a_row_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "grid.jsonl"
    record.append(out, record.Stamp("x", "y"), {})
    before = out.read_bytes()

    def fail(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        record.append(out, record.Stamp("x", "y"), {})
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("content", ['{"a": 1}\n{"b"', "[]\n", "1\n"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "grid.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"grid\.jsonl"):
        record.rows(tmp_path / "grid.jsonl")


def test_every_script_refuses_to_record_changed_code_before_it_measures(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "changes", lambda: ["llmprune/run.py"])
    (tmp_path / "g.toml").write_text('[grid]\nmethod = ["wanda"]\n[fixed]\nmodel = "none"\n')
    work, out = tmp_path / "work", tmp_path / "out"
    calib = ["--calib", str(text)]
    commands: list[tuple[Any, list[str]]] = [
        (expert_scale, ["--work", str(work)]),
        (peers, ["--model", str(tiny), *calib, "--eval", str(text)]),
        (processes, ["--work", str(work), "--", "--model", "none"]),
        (scale, ["--shape", "tiny", "--work", str(work)]),
        (solvers, ["none", *calib, "--blocks", "0"]),
        (speed, ["none", "none"]),
        (structured_scale, ["--inputs", "64"]),
        (sweep, [str(tmp_path / "g.toml")]),
        (zero_shot, ["none", "--tasks", "none.jsonl"]),
    ]
    for script, arguments in commands:
        assert script.main(["--out", str(out), *arguments]) == 2, script
        assert "would record code that no commit holds" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["g.toml"]
