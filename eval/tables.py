"""`python -m eval.tables`: rewrite the tables of the README, the pages and eval/LOG.md from eval/results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. NAME is a JSON-lines file of `eval.sweep`, or a JSON
file of `eval.peers`, `eval.scale`, `eval.processes`, `eval.zero_shot`, `eval.speed`, `eval.solvers`,
`eval.structured_scale`, `eval.expert_scale`, `eval.quantizers`, `eval.int4_kernel`, `eval.zeros`, `eval.distill` or
`eval.gradual`, or that of `eval.families`. Figures are never typed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib

from eval import (
    distill,
    expert_scale,
    families,
    gradual,
    int4_kernel,
    peers,
    processes,
    quantizers,
    record,
    scale,
    solvers,
    speed,
    structured_scale,
    sweep,
    zero_shot,
    zeros,
)
from llmprune.cli.shell import Parser, say

MAKERS = {
    "larger": scale.table,
    "turns": processes.table,
    "quality": peers.table,
    "results": zero_shot.table,
    "cells": structured_scale.table,
    "beside_dense": expert_scale.table,
    "promised": speed.table,
    "solved": solvers.table,
    "schemes": zeros.table,
    "grid": quantizers.table,
    "products": int4_kernel.table,
    "undone": distill.table,
    "paths": gradual.table,
}
"""Who makes the table of a result, by a key that only such results have."""


def render(name: str) -> str:
    """The Markdown of one result, with the commands it comes from."""
    if (file := record.RESULTS / f"{name}.json").exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        source = f"From `eval/results/{name}.json`, written at commit {result['commit']} by:"
        table = next(maker for mark, maker in MAKERS.items() if mark in result)
        return f"{table(result).strip()}\n\n{source}\n```\n{result['command']}\n```"
    path = record.RESULTS / f"{name}.jsonl"
    if path == families.OUT:
        return f"{families.table(record.rows(path))}\nFrom `eval/results/{path.name}`, by `python -m eval.families`."
    grid = tomllib.loads((record.ROOT / "eval" / "grids" / f"{name}.toml").read_text(encoding="utf-8"))
    cells, dense = sweep.recorded(grid, path)
    missing = len(sweep.cells(grid)) - len(cells)
    return "\n".join(
        [
            sweep.table(cells, dense),
            "",
            sweep.caption(cells, dense) + (f" Without a result: {missing} cells of the grid." if missing else ""),
            f"From `eval/results/{path.name}`, by `python -m eval.sweep eval/grids/{name}.toml`; the first row is:",
            f"```\n{cells[0][1]['command']}\n```",
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
    for path in (record.ROOT / name for name in record.PAGES):
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
        say(f"rewrote {path.relative_to(record.ROOT)}", sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
