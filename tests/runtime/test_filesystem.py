"""What a file system cannot do stops no run; that two processes work in one folder is prevented without locks too."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import execute
from helpers import job

from llmprune import InputError, pack, prune, unpack
from llmprune.progress import Progress
from llmprune.runtime.filesystem import HOLDER, UNSUPPORTED, sync
from llmprune.runtime.ownership import LOCK, MARK, own_folder, scratch_folder
from llmprune.sources.cache import make_once

HERE = socket.gethostname()


def refusing(code: int, real: Callable[..., Any], only: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """A function of the system that fails."""

    def call(*arguments: Any, **named: Any) -> Any:
        if only(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    return call


@pytest.fixture(params=sorted(UNSUPPORTED), ids=lambda code: errno.errorcode[code])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(request.param, fcntl.flock))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".out.partial"


def left_by(folder: Path, named: str, age: float = 0) -> Path:
    """A folder as a process left it that named itself so."""
    folder.mkdir()
    (folder / LOCK).write_bytes(MARK)
    (folder / "half").write_text("half")
    (folder / HOLDER).write_text(named)
    os.utime(folder / HOLDER, (time.time() - age,) * 2)
    return folder / HOLDER


def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.usefixtures("without_locks")
def test_a_folder_is_held_without_locks(folder: Path) -> None:
    with own_folder(folder):
        assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
        assert (folder / HOLDER).read_text() == f"{os.getpid()} {HERE}\n"
        with pytest.raises(InputError, match="another llmprune is writing") as refused, own_folder(folder):
            pass
        assert f"remove {folder / HOLDER}" in refused.value.hint
    assert [path.name for path in folder.iterdir()] == [LOCK]
    with scratch_folder(folder):
        (folder / "new").write_text("new")
    assert not list(folder.parent.iterdir())


@pytest.mark.usefixtures("without_locks")
def test_a_second_process_waits_without_locks(folder: Path) -> None:
    steps: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with scratch_folder(folder, waits.set):
            steps.append("second")

    thread = threading.Thread(target=second)
    with scratch_folder(folder):
        thread.start()
        assert waits.wait(10)
        steps.append("first")
    thread.join(10)
    assert steps == ["first", "second"]
    assert not list(folder.parent.iterdir())


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK, fcntl.flock))


@pytest.mark.usefixtures("lockless")
@pytest.mark.parametrize("named", ["ended", "mine", "", "rubbish", "x y z", "-1x host"])
def test_what_a_killed_process_held_is_taken_over(named: str, folder: Path) -> None:
    left_by(folder, {"ended": f"{gone()} {HERE}\n", "mine": f"{os.getpid()} {HERE}\n"}.get(named, named), age=60)
    with scratch_folder(folder):
        assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
    assert not list(folder.parent.iterdir())


@pytest.mark.usefixtures("lockless")
@pytest.mark.parametrize("named", [f"{os.getppid()} {HERE}\n", "12 another-machine\n", ""])
def test_what_may_still_be_held_is_refused_and_left_as_it_is(named: str, folder: Path) -> None:
    holder = left_by(folder, named)
    with pytest.raises(InputError, match="another llmprune is writing") as refused, own_folder(folder):
        pass
    assert (folder / "half").exists()
    assert not named or (named.split()[1] in refused.value.message and str(holder) in refused.value.hint)
    holder.unlink()
    with own_folder(folder):
        assert (folder / "half").exists()


@pytest.mark.usefixtures("lockless")
def test_the_cache_leaves_alone_what_another_machine_fills(tmp_path: Path) -> None:
    left_by(tmp_path / ".a.making", "12 another-machine\n")
    left_by(tmp_path / ".b.making", f"{gone()} {HERE}\n")
    made = make_once(tmp_path / "c", (tmp_path / "c").exists, lambda new: new.touch(), Progress())
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".a.making", made])


def test_a_failing_disk_is_no_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO, fcntl.flock))
    with pytest.raises(OSError, match="Input/output error"), own_folder(folder):
        pass


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_flushed_is_an_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(code, os.fsync))
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    timed = ("prune_report", "README")
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(timed)}


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM])
def test_a_run_needs_neither_locks_nor_modes_nor_flushed_folders(
    code: int, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"samples": 2, "seq_len": 8, "method": "magnitude"}
    prune(job(tiny, tmp_path / "wanted", text, **small))
    monkeypatch.setattr(fcntl, "flock", refusing(code, fcntl.flock))
    for name in ("chmod", "fchmod", "lchmod"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refusing(code, getattr(os, name)))
    is_folder = lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode)  # noqa: E731
    monkeypatch.setattr(os, "fsync", refusing(code, os.fsync, is_folder))
    prune(job(tiny, tmp_path / "out", text, **small))
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    prune(job(tiny, tmp_path / "out", text, overwrite=True, **{**small, "method": "wanda"}))
    pack(tmp_path / "out", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"wanted", "out", "packed", "again"}


@pytest.mark.parametrize("missing", [["fcntl"], ["fcntl", "resource"]])
def test_a_system_that_lacks_what_is_needed_is_told_so(missing: list[str], tmp_path: Path) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import llmprune"
    done = execute([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: llmprune runs on Linux and macOS: this system's Python has no ")
    assert all(f"no {name}" in last for name in missing)
