"""`python -m eval.front RESULTS.jsonl [...] --out PICTURE.png`: perplexity over the size of the folder, as a picture.

Points are the cells of grids of `eval.sweep` that measured the same texts; a line joins those that differ in their bits
alone. The dense model is a line across: its size is that of the stored source.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eval.sweep import Cells, read
from llmprune.cli.shell import Parser, run_command, say
from llmprune.errors import InputError

PLAIN = "bfloat16"
"""What stands for a cell without a grid."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.front", description="Draw perplexity over size.", allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="of grids with the same texts")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.png", help="the picture")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def points(cells: Cells, text: str) -> dict[str, list[tuple[float, float, str]]]:
    """Size in MiB, perplexity and bits of every cell, in order of size, by what else the cells are.

    Args:
        cells: settings and results.
        text: on which perplexity was measured.
    """
    found: dict[str, list[tuple[float, float, str]]] = {}
    for settings, result in cells:
        named = ", ".join(str(value) for key, value in settings.items() if key != "quantize")
        point = (result["size"]["pruned"] / 2**20, result["texts"][text]["value"], settings.get("quantize", PLAIN))
        found.setdefault(named, []).append(point)
    return {name: sorted(line) for name, line in found.items()}


def draw(cells: Cells, dense: dict[str, Any], out: Path) -> None:
    """Write the picture, one panel a text.

    Args:
        cells: settings and results.
        dense: the dense model's perplexity on the texts.
        out: the PNG file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(dense), figsize=(5.4 * len(dense), 4), squeeze=False, layout="constrained")
    for axis, (text, baseline) in zip(axes[0], dense.items(), strict=True):
        for name, line in points(cells, text).items():
            sizes, values, bits = zip(*line, strict=True)
            axis.plot(sizes, values, marker="o", linewidth=1.2, label="not pruned" if name == "none" else name)
            for size, value, label in zip(sizes, values, bits, strict=True):
                axis.annotate(label, (size, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.axhline(baseline["value"], color="gray", linestyle="--", linewidth=1, label="dense")
        axis.set(xlabel="size of the weights, MiB", ylabel=f"perplexity, {text}", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def run(options: argparse.Namespace) -> int:
    """Read the results, draw them.

    Raises:
        InputError: there are none, or they measured other texts.
    """
    cells: Cells = []
    dense: dict[str, Any] = {}
    for path in options.results:
        found, measured = read(path)
        if not found or not measured or (dense and measured.keys() != dense.keys()):
            raise InputError(
                f"{path} has {len(found)} cells on {', '.join(measured) or 'no text'}, "
                f"not on {', '.join(dense) or 'texts of its own'}",
                "name results of grids whose [also] names the same texts",
            )
        cells, dense = cells + found, dense or measured
    draw(cells, dense, options.out)
    say(f"drew {options.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
