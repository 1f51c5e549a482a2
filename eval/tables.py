"""`python -m eval.tables`: rewrite the tables of README.md and eval/LOG.md from the JSON in eval/results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. NAME is a folder of `eval.sweep` or a JSON file of
`eval.peers`, `eval.scale`, `eval.processes`, `eval.zero_shot`, `eval.speed`, `eval.solvers` or
`eval.structured_scale`. Figures are never typed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from eval import peers, processes, scale, solvers, speed, structured_scale, sweep, zero_shot
from llmprune.cli.shell import Parser

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
MAKERS = {
    "larger": scale.table,
    "turns": processes.table,
    "quality": peers.table,
    "results": zero_shot.table,
    "cells": structured_scale.table,
    "promised": speed.table,
    "solved": solvers.table,
}
"""Who makes the table of a result, by a key that only such results have."""
PAGES = (ROOT / "README.md", ROOT / "eval" / "LOG.md")


def render(name: str) -> str:
    """The Markdown of one result, with the commands it comes from."""
    if (file := RESULTS / f"{name}.json").exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        source = f"From `eval/results/{name}.json`, written at commit {result['commit']} by:"
        table = next(maker for mark, maker in MAKERS.items() if mark in result)
        return f"{table(result).strip()}\n\n{source}\n```\n{result['command']}\n```"
    grid = tomllib.loads((ROOT / "eval" / "grids" / f"{name}.toml").read_text(encoding="utf-8"))
    cells: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for settings in sweep.cells(grid):
        path = RESULTS / name / sweep.file_name(settings)
        cells.append((settings, json.loads(path.read_text(encoding="utf-8"))))
    first, dense = cells[0][1], sweep.read_dense(RESULTS / name)
    return "\n".join(
        [
            sweep.table(cells, dense),
            "",
            sweep.caption(cells, dense),
            f"From `eval/results/{name}/*.json`, by `python -m eval.sweep eval/grids/{name}.toml`; the first row is:",
            f"```\n{first['command']}\n```",
        ]
    )


def rewrite(page: str) -> str:
    """A page with all its tables made anew."""
    return re.sub(
        r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{render(match[2])}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> int:
    """Rewrite the pages."""
    Parser(prog="python -m eval.tables", description=__doc__, allow_abbrev=False).parse_args()
    for path in PAGES:
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
        sys.stderr.write(f"rewrote {path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
