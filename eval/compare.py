"""`python -m eval.compare RUN [RUN ...] --out FILE`: several runs side by side, as a picture or as a page."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from eval import sweep
from llmprune.cli.shell import Parser, run_command, say
from llmprune.errors import InputError
from llmprune.reporting import charts as chart
from llmprune.reporting.html_report import by_kind, page, table
from llmprune.reporting.report import FILE

COLUMNS = ("run", "pattern", "perplexity, dense", "perplexity, pruned", "layer error", "pruning, s", "peak, MiB")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.compare", description="Show several runs side by side.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="pruned folder, or .jsonl of eval.sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="FILE.png or FILE.html to write")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout, not as a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@dataclass(frozen=True, slots=True)
class Run:
    """What is shown of a run.

    Args:
        name: method, with what distinguishes it from the others.
        facts: one value for each of `COLUMNS` but the first.
        errors: relative output errors by layer kind, one a block.
    """

    name: str
    facts: dict[str, Any]
    errors: dict[str, list[float]]

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(error for row in self.errors.values() for error in row if not math.isnan(error))

    def by_block(self) -> list[float]:
        """Mean error of the layers of every block."""
        columns = [
            [error for error in column if not math.isnan(error)] for column in zip(*self.errors.values(), strict=True)
        ]
        return [sum(column) / max(len(column), 1) for column in columns]


def read(path: Path) -> list[Run]:
    """The run of a pruned folder or of its report, or the runs of a JSON-lines file of `eval.sweep`.

    Raises:
        InputError: it is none of them.
    """
    if path.suffix == ".jsonl":
        cells, _ = sweep.read(path)
        if not cells:
            raise no_run(path, "no cell of a grid is there")
        return [make_run(path, result) for _, result in cells]
    try:
        report = json.loads((path / FILE if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise no_run(path, repr(error)) from error
    return [make_run(path, report)]


def make_run(path: Path, result: dict[str, Any]) -> Run:
    """What is shown of a report, or of a cell of a grid."""
    try:
        errors = result.get("layer_errors") or {layer["name"]: layer["error"] for layer in result["layers"]}
        evaluation = result["evaluation"] or {}
        effort = result.get("recipe", {}).get("effort")
        name = f"{result['method']['name']}{f' (effort {effort})' if effort else ''}"
        figures = [
            result["sparsity"]["pattern"],
            *(_perplexity(evaluation.get(key)) for key in ("dense", "pruned")),
            sum(errors.values()) / len(errors),
            result["seconds"]["prune"],
            result["peak_memory"] / 2**20,
        ]
        return Run(name, dict(zip(COLUMNS[1:], figures, strict=True)), by_kind(errors.items()))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise no_run(path, repr(error)) from error


def no_run(path: Path, reason: str) -> InputError:
    """The error of a path that names no run."""
    return InputError(f"{path} is no run: {reason}", "name a pruned folder, or a .jsonl of eval.sweep")


def _perplexity(value: dict[str, float] | None) -> str:
    return f"{value['value']:.2f} ± {value['error']:.2f}" if value else "-"


def draw_page(runs: Sequence[Run], out: Path) -> None:
    """One HTML file: the figures, the mean error by block, and a heat map a run, all of one scale."""
    worst = max(run.worst for run in runs)
    parts = [
        "<h1>Runs side by side</h1>",
        table(COLUMNS, [(run.name, *run.facts.values()) for run in runs]),
        "<h2>Mean layer error by block</h2>",
        chart.lines({f"{run.name}, {run.facts['pattern']}": run.by_block() for run in runs}),
        "<h2>Error by block and layer</h2>",
        chart.scale(worst),
    ]
    for run in runs:
        parts += [f"<h3>{escape(run.name)}, {escape(run.facts['pattern'])}</h3>", chart.heat_map(run.errors, worst)]
    out.write_text(page("Runs side by side", parts), encoding="utf-8")


def draw_picture(runs: Sequence[Run], out: Path) -> None:
    """The heat maps below each other, of one scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    worst = max(run.worst for run in runs)
    heights = [len(run.errors) for run in runs]
    size = (9, 0.6 + 0.4 * len(runs) + 0.22 * sum(heights))
    figure, axes = plt.subplots(
        len(runs), 1, figsize=size, squeeze=False, layout="constrained", sharex=True, height_ratios=heights
    )
    image: Any = None
    for axis, run in zip(axes[:, 0], runs, strict=True):
        image = axis.imshow(list(run.errors.values()), aspect="auto", cmap="Blues", vmin=0, vmax=worst)
        axis.set_yticks(range(len(run.errors)), [kind.rpartition(".")[2] for kind in run.errors], fontsize=8)
        perplexity = f", perplexity {run.facts['perplexity, pruned']}" if run.facts["perplexity, pruned"] != "-" else ""
        title = f"{run.name}, {run.facts['pattern']}: mean error {run.facts['layer error']:.3f}{perplexity}"
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("block")
    figure.colorbar(image, ax=axes, label="relative output error", shrink=0.9)
    figure.savefig(out, dpi=110)


DRAWERS = {".png": draw_picture, ".html": draw_page}


def compare(options: argparse.Namespace) -> int:
    """Print the figures of all runs, and draw them."""
    if options.out and options.out.suffix not in DRAWERS:
        raise InputError(f"--out {options.out} is neither .png nor .html", "name a file that is")
    runs = [run for path in options.runs for run in read(path)]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        DRAWERS[options.out.suffix](runs, options.out)
    rows = [{"run": run.name, **run.facts} for run in runs]
    say(json.dumps(rows, indent=2) if options.json else markdown(rows))
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "--:|" * (len(COLUMNS) - 2)]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), compare, argv)


if __name__ == "__main__":
    raise SystemExit(main())
