"""`python -m eval.picture RESULT [RESULT ...] --out FILE.png`: the error of every layer, as heat maps."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from llmprune.cli import Parser, run_command


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.picture", description="Draw where pruning hurts.", allow_abbrev=False)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="pruned folders, or results of eval.sweep"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def errors_of(path: Path) -> tuple[str, list[str], list[list[float]]]:
    """Title, layer kinds, and the errors by kind and block, of a result of `eval.sweep` or a pruned folder's report."""
    result = json.loads((path / "prune_report.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    errors = result.get("layer_errors") or {layer["name"]: layer["error"] for layer in result["layers"]}
    found: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        block, kind = re.findall(r"\.(\d+)\.(.*)$", name)[0]
        found.setdefault(kind.rpartition(".")[2], {})[int(block)] = error
    blocks = 1 + max(max(row) for row in found.values())
    rows = [[row.get(block, float("nan")) for block in range(blocks)] for row in found.values()]
    mean = sum(errors.values()) / len(errors)
    return f"{result['method']['name']}, {result['sparsity']['pattern']}: mean {mean:.3f}", list(found), rows


def draw(options: argparse.Namespace) -> int:
    """Draw all folders with one colour scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [errors_of(path) for path in options.results]
    top = max(max(row) for _, _, rows in panels for row in rows)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.6 + 1.9 * len(panels)), squeeze=False, layout="constrained", sharex=True
    )
    image: Any = None
    for axis, (title, kinds, rows) in zip(axes[:, 0], panels, strict=True):
        image = axis.imshow(rows, aspect="auto", cmap="magma_r", vmin=0, vmax=top)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("block")
    figure.colorbar(image, ax=axes, label="relative output error", shrink=0.9)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), draw, argv)


if __name__ == "__main__":
    raise SystemExit(main())
