"""`python -m eval.sweep GRID.toml`: run llmprune over a grid of settings: a JSON-lines file, a table, a plot.

The grid is a table of lists; every combination is a cell:

    [grid]
    method = ["wanda", "sparsegpt"]
    sparsity = ["2:4", "50%"]
    [fixed]
    model = "demo"
    samples = 32

A cell is a line of the file: its command and commit, its `settings`, and the run's report. Cells that are there are not
run again. A list of tables `[[cells]]` names cells one by one instead; a key that a cell lacks is left to its
default.

With a table

    [also]
    texts = ["wikitext2", "notes.txt"]
    windows = 12
    context = 1024
    bos = ["yes", "no"]  # each text with both kinds of windows; left out: as the tokenizer begins a text

every cell's model is measured on these texts too, and the dense model once, in a line with the key `dense`. With

    [speed]
    engines = ["transformers", "llama.cpp"]
    repeats = 5  # and other flags of eval.speed

it is timed beside the dense model as well (`eval.speed`), and `speed` has the ratios by engine. At the end a Markdown
table is printed and a picture drawn: perplexity over the last setting, a line for each combination of the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import record
from eval.perplexity import measure
from eval.plot import draw
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.errors import InputError
from llmprune.pruning.recipe import EFFORTS
from llmprune.reporting.schema import upgraded
from llmprune.reporting.words import bos_text

Cells = list[tuple[dict[str, Any], dict[str, Any]]]


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.sweep", description="Run a grid of settings.", allow_abbrev=False)
    parser.add_argument("grid", type=Path, metavar="GRID.toml", help="what to run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for NAME.jsonl and NAME.png (default: eval/results)")
    parser.add_argument("--json", action="store_true", help="all cells as JSON on stdout instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def cells(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """All combinations, the last key varying fastest; or those that are named one by one."""
    if "cells" in grid:
        return [dict(cell) for cell in grid["cells"]]
    keys = list(grid["grid"])
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*grid["grid"].values())]


def read(path: Path) -> tuple[Cells, dict[str, Any]]:
    """Settings and results of the cells that a file has, and the dense model on the texts of `[also]`."""
    rows = record.rows(path)
    found = [(row.pop("settings"), row) for row in rows if "settings" in row]
    return found, next((row["dense"] for row in rows if "dense" in row), {})


def recorded(grid: dict[str, Any], path: Path) -> tuple[Cells, dict[str, Any]]:
    """The same, with the cells in the order of the grid; those that it does not name are left out."""
    found, dense = read(path)
    named = cells(grid)
    return sorted((cell for cell in found if cell[0] in named), key=lambda cell: named.index(cell[0])), dense


def caption(cells: Cells, dense: dict[str, Any]) -> str:
    """What all cells were measured on, and at which commits.

    Args:
        cells: settings and results.
        dense: the dense model on the texts of `[also]`.
    """
    results = [result for _, result in cells]
    result, commits = results[0], dict.fromkeys(found["commit"] for found in results)
    measured = dict(dense)
    if evaluation := result["evaluation"]:
        measured = {Path(evaluation["source"]).name: {**evaluation["dense"], "sha256": evaluation["sha256"]}} | measured
    texts = "; ".join(
        f"{text}, {found['windows']} windows of {found['context']} tokens (sha256 {found['sha256'][:12]}), "
        f"dense {found['value']:.2f} ± {found['error']:.2f}"
        for text, found in measured.items()
    )
    calibration = result["calibration"]
    size = f"{calibration['samples']} x {calibration['seq_len']} tokens, sha256 {calibration['sha256'][:12]}"
    pairs = [(text, settings) for settings, found in cells for text in found["texts"]]
    shares = any((recovered_fraction(text, settings, cells, dense) or 0) > 0 for text, settings in pairs)
    brackets = " In brackets the recovered fraction of SparseGPT's increase in log perplexity." if shares else ""
    return (
        f"Perplexity on {texts}.{brackets} Calibration on {Path(calibration['source']).name} (first row {size}); "
        f"commit {', '.join(commits)}."
    )


def flags(settings: dict[str, Any]) -> list[str]:
    """Command-line flags for settings; lists repeat the flag, True stands alone, False negates it."""
    found: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            found += [f"--{name}" if item else f"--no-{name}"] if isinstance(item, bool) else [f"--{name}", str(item)]
    return found


def run_cell(
    settings: dict[str, Any], also: dict[str, Any], speed: dict[str, Any], out: Path
) -> tuple[record.Stamp, dict[str, Any]]:
    """One run of the command line: its stamp, and its report with the layers' errors in place of the layers."""
    command = ["llmprune", *flags(settings)]
    stamp = record.stamp(command, out)
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--out", f"{folder}/out", "--json", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "llmprune", *command[1:], *extra], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InputError(f"{' '.join(command)} failed: {done.stderr.strip()}", "see above")
        report = json.loads(done.stdout)
        texts = measured(f"{folder}/out", also) if also else {}
        ratios = {"speed": speeds(settings["model"], f"{folder}/out", **speed)} if speed else {}
    errors = {layer["name"]: round(layer["error"], 6) for layer in report.pop("layers")}
    for key in ("out", "command"):
        report.pop(key)
    known = list(errors.values()) or [mixture["error"] for mixture in report["mixtures"]]
    # Where whole blocks are removed and nothing is fitted, no layer has an error.
    mean = sum(known) / len(known) if known else None
    return stamp, {"mean_layer_error": mean, "layer_errors": errors, "texts": texts, **ratios, **report}


def speeds(dense: str, pruned: str, engines: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    """How many times as fast as the dense model a pruned one is, by engine, in prefill and in decoding."""
    found = {}
    for engine in engines:
        command = [sys.executable, "-m", "eval.speed", dense, pruned, "--engine", engine, *flags(settings), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{' '.join(command[1:])} failed: {done.stderr.strip()}", "see above")
        found[engine] = json.loads(done.stdout)["speedup"]
    return found


def measure_dense(model: str, also: dict[str, Any], out: Path) -> None:
    """Add the dense model on the texts of `[also]` to the results."""
    sizes = ["--windows", str(also["windows"]), "--context", str(also["context"])]
    sizes += ["--bos", *also["bos"]] if "bos" in also else []
    stamp = record.stamp(["python", "-m", "eval.perplexity", model, "--text", *also["texts"], *sizes], out)
    record.append(out, stamp, {"dense": measured(model, also)})


def measured(model: str, also: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The perplexities of a model on the texts of `[also]`, by the text, and how windows begin where that is named."""
    if "bos" not in also:
        return measure(model, **also)
    return {
        text + bos_text(found): found
        for bos in also["bos"]
        for text, found in measure(model, **{**also, "bos": bos}).items()
    }


def recovered_fraction(text: str, settings: dict[str, Any], cells: Cells, dense: dict[str, Any]) -> float | None:
    """The fraction of SparseGPT's increase in log perplexity that a cell recovers.

    That is `ln(ppl_SparseGPT / ppl) / ln(ppl_SparseGPT / ppl_dense)`.

    SparseGPT is the cell with the stages of `fast`, the same sparsity and the same calibration tokens.

    Args:
        text: on which.
        settings: of the cell.
        cells: all cells, with their results.
        dense: perplexities of the dense model.

    Returns:
        the fraction, 0 for SparseGPT itself; None where there is no such cell or the dense model was not measured.
    """
    ours = next(result for own, result in cells if own == settings)
    same = (result for _, result in cells if _is_sparsegpt(result) and _problem(result) == _problem(ours))
    known = next(same, None)
    if known is None or text not in dense:
        return None
    value = known["texts"][text]["value"]
    return math.log(value / ours["texts"][text]["value"]) / math.log(value / dense[text]["value"])


def _is_sparsegpt(result: dict[str, Any]) -> bool:
    """Whether a run was SparseGPT without further stages."""
    stages = {"method": "", **upgraded(result).get("recipe", {})}  # an older result lacks the stages that came later
    return all(stages.get(key, value) == value for key, value in asdict(EFFORTS["fast"]).items())


def _problem(result: dict[str, Any]) -> tuple[str, str]:
    """What a run was given: the sparsity and the calibration tokens."""
    return result["sparsity"]["pattern"], result["calibration"]["sha256"]


def table(results: Cells, dense: dict[str, Any]) -> str:
    """A Markdown table of the cells; where SparseGPT is among them, with the `recovered_fraction` of each."""
    keys = list(dict.fromkeys(key for settings, _ in results for key in settings))
    texts = list(results[0][1]["texts"])
    evaluated = [] if results[0][1]["evaluation"] is None else ["perplexity"]
    sizes = [result["size"]["pruned"] for _, result in results if result.get("size")]
    sized = ["size, MiB"] if len(set(sizes)) > 1 else []
    head = [*keys, *sized, *evaluated, *texts, "layer error", "pruning, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for settings, result in results:
        row = [_named(settings.get(key, ""), result) for key in keys]
        row += [f"{result['size']['pruned'] / 2**20:.0f}"] if sized else []
        row += [_measured(result["evaluation"]["pruned"])] if evaluated else []
        row += [_measured(result["texts"][text], recovered_fraction(text, settings, results, dense)) for text in texts]
        error = result["mean_layer_error"]
        row += ["" if error is None else f"{error:.4f}", f"{result['seconds']['prune']:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _named(value: Any, result: dict[str, Any]) -> str:
    """A setting; a size with what was chosen for it."""
    facts = result.get("sparsity", {})
    return f"{value} ({facts['pattern']})" if value and value == facts.get("asked") else str(value)


def _measured(found: dict[str, float], share: float | None = None) -> str:
    return f"{found['value']:.2f} ± {found['error']:.2f}" + (f" ({share:.2f})" if share and share > 0 else "")


def run(options: argparse.Namespace) -> int:
    """Run what is missing, then print the table."""
    silence_libraries(options.debug)
    try:
        grid = tomllib.loads(options.grid.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{options.grid} is no grid: {error}", "name a file such as eval/grids/demo.toml") from error
    out = (options.out or record.RESULTS) / f"{options.grid.stem}.jsonl"
    found, dense = read(out)
    also = grid.get("also", {})
    if also and not dense:
        measure_dense(grid["fixed"]["model"], also, out)
    done = [settings for settings, _ in found]
    for settings in cells(grid):
        if settings not in done:
            say(f"running {settings}", sys.stderr)
            stamp, result = run_cell({**grid.get("fixed", {}), **settings}, also, grid.get("speed", {}), out)
            record.append(out, stamp, {"settings": settings, **result})
    results, dense = recorded(grid, out)
    say(json.dumps([result for _, result in results], indent=2) if options.json else table(results, dense))
    picture = out.with_suffix(".png")
    try:
        draw(results, dense, picture)
        say(f"drew {picture}", sys.stderr)
    except ImportError:
        say("no plot: matplotlib is not installed (pip install matplotlib)", sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
