"""`python -m eval.structured_scale`: time and memory that removing inputs of one layer takes, and how they grow.

Every size is solved in a process of its own: choice of the inputs and least squares, on random inputs whose sizes
differ and which share some directions. Memory is the peak above what that process took with weights and Gram in it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import record
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive
from llmprune.pruning.criteria import CRITERIA

TOKENS, SHARED = 4096, 64
SMALL = 4096


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.structured_scale", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    widths = [1536, 4096, 8192, 14336]
    parser.add_argument("--inputs", type=positive, nargs="+", default=widths, metavar="N", help="of the layer")
    parser.add_argument("--outputs", type=positive, metavar="N", help="of the layer (default: 576 of 1536, else 4096)")
    parser.add_argument("--methods", nargs="+", choices=CRITERIA, default=["obs", "lasso"], help="criteria")
    parser.add_argument("--percent", type=positive, default=25, metavar="N", help="of the inputs that go (default: 25)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write; sizes that stand there are kept")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def solve(method: str, inputs: int, outputs: int, percent: int, threads: int) -> dict[str, Any]:
    """Remove inputs of one random layer; seconds by the clock and of the processor, bytes beyond the problem's."""
    import torch

    from llmprune.pruning.criteria import load_criterion
    from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, UnitRemoval
    from llmprune.pruning.recipe import Recipe
    from llmprune.pruning.structured_solver import StructuredSolver
    from llmprune.runtime.memory import mmap_large_allocations, peak_memory, resident_memory

    torch.set_num_threads(threads)
    with mmap_large_allocations(), torch.no_grad():
        stats = InputStats(TOKENS, _gram(inputs))
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) / math.sqrt(inputs)
        count = inputs * percent // 100
        removal = UnitRemoval(torch.arange(inputs).view(1, inputs, 1), count)
        problem = GroupProblem((LayerProblem("layer", weight),), stats, removal=removal)
        solver = StructuredSolver(load_criterion(method), Recipe("", criterion=method))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before, begun, busy = resident_memory(), time.perf_counter(), time.process_time()
        found = solver.solve(problem, None)
        spent = {"wall": time.perf_counter() - begun, "seconds": time.process_time() - busy}
        peak = peak_memory() - before
    assert found.order is not None
    assert len(found.order) == inputs - count
    return {**spent, "memory": peak, "unfitted": found.layers[0].stats["error_uncompensated"]}


def _gram(inputs: int) -> Any:
    """`XᵀX / tokens` of random inputs, each with as much noise of its own, as if there were any number of tokens."""
    import torch

    from llmprune.pruning.statistics import RunningGram

    generator = torch.Generator().manual_seed(0)
    running = RunningGram(inputs, torch.device("cpu"))
    size = torch.randn(inputs, generator=generator).exp()
    shared = torch.randn(SHARED, inputs, generator=generator) / 4
    for _ in range(TOKENS // 1024):
        common = torch.randn(1024, SHARED, generator=generator) @ shared
        running.add(torch.randn(1024, inputs, generator=generator).add_(common).mul_(size))
        del common
    gram = running.result().gram
    gram.diagonal().mul_(2)
    return gram


def run_scale(options: argparse.Namespace, given: Sequence[str]) -> int:
    """The command."""
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", "eval.structured_scale", *given], options.out)
    done = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    cells: list[dict[str, Any]] = done.get("cells", [])
    for method in options.methods:
        for inputs in options.inputs:
            outputs = options.outputs or (576 if inputs <= 1536 else SMALL)
            settings = {"method": method, "inputs": inputs, "outputs": outputs, "percent": options.percent}
            if any(settings.items() <= cell.items() for cell in cells):
                continue
            cells.append({**settings, "commit": stamp.commit, **_apart(options.threads, settings)})
            say(f"{cells[-1]}", sys.stderr)
            _write(options, stamp, cells)
    result = _write(options, stamp, cells)
    say(json.dumps(result, indent=2) if options.json else table(result))
    return 0


def _write(options: argparse.Namespace, stamp: record.Stamp, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known so far, into the file."""
    cells.sort(key=lambda cell: (cell["method"] != "obs", cell["method"], cell["inputs"]))
    return record.write(options.out, stamp, {"threads": options.threads, "cells": cells})


def _apart(threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One solve in a process of its own."""
    arguments = json.dumps({**settings, "threads": threads})
    command = [sys.executable, "-m", "eval.structured_scale", "--worker", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: time and memory by method and size, and the power of the width by which the time grows."""
    head = ["method", "layer", "processor, s", "clock, s", "beyond weights and Gram, GiB", "time grows as"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|--:|--:|--:|---|"]
    before: dict[str, Any] = {}
    for cell in result["cells"]:
        same = before.get("method") == cell["method"] and before.get("outputs") == cell["outputs"]
        ratio = cell["inputs"] / before["inputs"] if same else 1
        power = f"inputs^{math.log(cell['seconds'] / before['seconds'], ratio):.1f}" if ratio > 1 else ""
        lines.append(
            f"| {cell['method']} | {cell['outputs']} x {cell['inputs']} | {cell['seconds']:.1f} | {cell['wall']:.1f} | "
            f"{cell['memory'] / 2**30:.2f} | {power} |"
        )
        before = cell
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--worker"]:
        say(json.dumps(solve(**json.loads(arguments[1]))))
        return 0
    return run_command(build_parser(), lambda options: run_scale(options, arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
