"""What tests of the command line share."""

from __future__ import annotations

import json
import os
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

from helpers import ROOT

WEIGHTS = "model.safetensors"


REPORT = "prune_report.json"


Disk = namedtuple("Disk", "total used free")


class Outcome(namedtuple("Outcome", "code out err")):
    """Exit code, stdout and stderr."""

    def line(self, start: str) -> str:
        """The only line of stderr with this start."""
        lines = [line for line in self.err.splitlines() if line.startswith(start)]
        assert len(lines) == 1, self.err
        return lines[0]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; folders without."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def with_value(flags: list[str], flag: str, value: object) -> list[str]:
    """The job with one flag set to something else."""
    return [*flags[: flags.index(flag) + 1], str(value), *flags[flags.index(flag) + 2 :]]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def execute(
    command: list[str], folder: Path, limit: float = 90, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run another process, this checkout first on its path, for so many seconds at most."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=limit
    )
