"""Records results: by which command and at which commit they were measured, without a path of the machine.

A script takes a `stamp` before it measures anything and hands it to `write` (one result, JSON) or `append` (one cell of
a grid, a line of a JSON-lines file) when it has. Nothing else writes a result.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from llmprune.cli.flags import version
from llmprune.errors import InputError
from llmprune.runtime.files import replacing
from llmprune.runtime.redact import PART, WHOLE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
PAGES = ("README.md", "docs/results.md", "docs/reference/families.md", "docs/guides/after-pruning.md", "eval/LOG.md")
"""What has tables of results (`eval.tables`)."""
MADE = ("eval/results", *PAGES)
"""Files that hold results and the tables made of them: a change there is no change of the code that runs."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which command measured a result, and at which commit (None: not at any; such a result is printed only)."""

    command: str
    commit: str | None


def stamp(command: Sequence[str], out: Path | None) -> Stamp:
    """The stamp of a measurement that begins now.

    Args:
        command: its words, such as `["python", "-m", "eval.speed", "demo", "pruned"]`.
        out: where the result will be recorded; None if it is printed only.

    Raises:
        InputError: it will be recorded, and tracked files have changes that no commit holds.
    """
    changed = changes()
    if changed and out is not None:
        raise InputError(
            f"{out} would record code that no commit holds: {len(changed)} changed files, such as {changed[0]}",
            "commit or stash the changes first; without --out some scripts only print their result",
        )
    return Stamp(shlex.join(map(portable, command)), None if changed else commit())


def write(out: Path | None, stamp: Stamp, result: dict[str, Any]) -> dict[str, Any]:
    """The result as it is recorded, stamp first; in `out` as JSON, if there is one."""
    found = {**asdict(stamp), **portable(result)}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def append(out: Path, stamp: Stamp, row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is recorded, stamp first; the JSON-lines file `out` is replaced by itself and this row."""
    found = {**asdict(stamp), **portable(row)}
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) + "\n" for one in [*rows(out), found]]
    with replacing(out) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file.

    Raises:
        InputError: a line is no JSON object.
    """
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON line by line: {error}", "restore or delete it") from error
    if not all(isinstance(row, dict) for row in found):
        raise InputError(f"{path} holds lines that are no JSON objects", "restore or delete it")
    return found


def portable(value: Any) -> Any:
    """The same value; of absolute paths in its texts is left what lies below the checkout, else the last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    return _shortened(value) if WHOLE.fullmatch(value) else PART.sub(lambda found: _shortened(found[0]), value)


def _shortened(text: str) -> str:
    path = Path(text)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else PureWindowsPath(text).name


def changes() -> list[str]:
    """Tracked files of the checkout that differ from its commit, those that hold results left out."""
    ignored = [f":(exclude){name}" for name in MADE]
    lines = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *ignored)
    return [line[3:] for line in (lines or "").splitlines()]


def commit() -> str:
    """The commit of this checkout, 12 digits; the package's version where there is none."""
    return (_git("rev-parse", "--short=12", "HEAD") or f"llmprune {version()}").strip()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no checkout, or no git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout
