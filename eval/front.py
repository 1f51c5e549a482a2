"""`python -m eval.front RESULTS.jsonl [...] --out PICTURE.png`: perplexity over size or speed, as a picture.

Points are the cells of grids of `eval.sweep` that measured the same texts; a line joins those that differ in their bits
alone, or in how much of one kind of part is removed. The dense model is a line across: its size is that of the stored
source, its speed is 1.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from eval.sweep import Cells, read
from llmprune.cli.shell import Parser, run_command, say
from llmprune.errors import InputError

PLAIN = "bfloat16"
"""What stands for a cell without a grid."""
SIZE, MEASURES = "size", ("prefill", "decode")
PARTS = re.compile(r"(blocks|channels|heads|experts|size):([^+]+)")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.front", description="Draw perplexity over size or speed.", allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="of grids with the same texts")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.png", help="the picture")
    parser.add_argument("--over", choices=(SIZE, *MEASURES), default=SIZE, help="the axis across (default: size)")
    parser.add_argument("--engine", default="transformers", help="whose speed (default: transformers)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def points(
    cells: Cells, text: str, over: str = SIZE, engine: str = "transformers"
) -> dict[str, list[tuple[float, float, str]]]:
    """Place on the axis, perplexity and label of every cell, in order of place, by what else the cells are.

    Args:
        cells: settings and results.
        text: on which perplexity was measured.
        over: `size` in MiB, or the speed over the dense model in `prefill` or `decode`.
        engine: whose speed.

    Raises:
        InputError: a cell's speed was not measured.
    """
    found: dict[str, list[tuple[float, float, str]]] = {}
    for settings, result in cells:
        line, label = named(settings)
        found.setdefault(line, []).append((place(result, over, engine), result["texts"][text]["value"], label))
    return {name: sorted(line) for name, line in found.items()}


def named(settings: dict[str, Any]) -> tuple[str, str]:
    """The line of a cell, and its label there: how much is removed where that is of one kind, or its bits."""
    bits = settings.get("quantize", PLAIN)
    names = {key: str(value) for key, value in settings.items() if key != "quantize"}
    match = PARTS.fullmatch(names.get("sparsity", ""))
    if match is None:
        return ", ".join(names.values()), bits
    line = ", ".join((names | {"sparsity": match[1]}).values())
    return line, match[2] + (f", {bits}" if "quantize" in settings else "")


def place(result: dict[str, Any], over: str, engine: str) -> float:
    """Where a cell is on the axis across."""
    if over == SIZE:
        return float(result["size"]["pruned"] / 2**20)
    if engine not in result.get("speed", {}):
        raise InputError(
            f"{result['sparsity']['pattern']} has no speed in {engine}", "add [speed] to the grid and run it anew"
        )
    return float(result["speed"][engine][over]["median"])


def draw(cells: Cells, dense: dict[str, Any], out: Path, over: str = SIZE, engine: str = "transformers") -> None:
    """Write the picture, one panel a text.

    Args:
        cells: settings and results.
        dense: the dense model's perplexity on the texts.
        out: the PNG file.
        over: see `points`.
        engine: likewise.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(dense), figsize=(5.4 * len(dense), 4), squeeze=False, layout="constrained")
    for axis, (text, baseline) in zip(axes[0], dense.items(), strict=True):
        for name, line in points(cells, text, over, engine).items():
            sizes, values, bits = zip(*line, strict=True)
            axis.plot(sizes, values, marker="o", linewidth=1.2, label="not pruned" if name == "none" else name)
            for size, value, label in zip(sizes, values, bits, strict=True):
                axis.annotate(label, (size, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.axhline(baseline["value"], color="gray", linestyle="--", linewidth=1, label="dense")
        across = "size of the weights, MiB" if over == SIZE else f"{over}, times as fast as dense ({engine})"
        axis.set(xlabel=across, ylabel=f"perplexity, {text}", yscale="log")
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
    draw(cells, dense, options.out, options.over, options.engine)
    say(f"drew {options.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
