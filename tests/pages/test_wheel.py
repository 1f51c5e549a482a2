"""The wheel holds `llmprune` and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from this checkout with what is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_nothing_but_the_package_lies_at_the_top(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    info = next(name for name in top if name.endswith(".dist-info"))
    assert top == {"llmprune", info}


def test_every_module_is_inside(wheel: zipfile.ZipFile) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llmprune").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules


def test_types_are_inside(wheel: zipfile.ZipFile) -> None:
    assert "llmprune/py.typed" in wheel.namelist()


def test_the_script_and_the_licence_are_there(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(info).decode().split() == ["[console_scripts]", "llmprune", "=", "llmprune.cli.main:entry"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_metadata_asks_for_what_the_package_imports(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    needed = {
        re.split(r"[<>=; ]", line.split(": ")[1])[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist")
    }
    assert {"torch", "transformers", "safetensors", "tqdm", "greenlet", "gguf"} <= needed
    assert "License-Expression: Apache-2.0" in metadata
