"""`python -m eval.picture DIR [DIR ...] --out FILE.png`: the error of every layer of pruned folders, as heat maps."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from llmprune.cli import Parser, guarded


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.picture", description="Draw where pruning hurts.", allow_abbrev=False)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="folders that llmprune wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def errors_of(folder: Path) -> tuple[str, list[str], list[list[float]]]:
    """Title, layer kinds, and the errors by kind and block."""
    from llmprune.report import PruneReport

    report = PruneReport.read(folder)
    found: dict[str, dict[int, float]] = {}
    for layer in report.layers:
        block, kind = re.findall(r"\.(\d+)\.(.*)$", layer.name)[0]
        found.setdefault(kind, {})[int(block)] = layer.error
    blocks = 1 + max(max(row) for row in found.values())
    rows = [[row.get(block, float("nan")) for block in range(blocks)] for row in found.values()]
    title = f"{report.method['name']}, {report.sparsity['pattern']}: mean {report.mean_error:.3f}"
    return title, [kind.rpartition(".")[2] for kind in found], rows


def draw(options: argparse.Namespace) -> int:
    """Draw all folders with one colour scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [errors_of(folder) for folder in options.dirs]
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
    try:
        options = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return guarded(lambda: draw(options), options.debug)


if __name__ == "__main__":
    raise SystemExit(main())
