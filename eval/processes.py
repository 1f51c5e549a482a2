"""`python -m eval.processes`: one run by one process, by two, ... in turns; how the time falls.

Every process has one thread. Beside the wall time stands the processor time of the busiest process: on a machine where
other work takes the cores away, that is what tells how well the work was shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from eval import record
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive
from llmprune.runtime.ownership import scratch_folder


def serve(folder: Path, arguments: list[str]) -> int:
    """One process of a run: our own command, and then what it took from the moment when its libraries were loaded."""
    import torch

    from llmprune.cli import main as cli

    import_module("llmprune.run")
    began, spent = time.perf_counter(), time.process_time()
    code = cli.main(arguments)
    figures = {"wall": time.perf_counter() - began, "cpu": time.process_time() - spent}
    (folder / os.environ.get("RANK", "0")).write_text(json.dumps({**figures, "threads": torch.get_num_threads()}))
    return code


def run_with(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run by so many processes; its figures."""
    with scratch_folder(options.work):
        return _measured(size, options)


def _measured(size: int, options: argparse.Namespace) -> dict[str, Any]:
    launcher = [] if size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    arguments = [*options.arguments, "--no-eval", "--device", "cpu", "--threads", "1", "--quiet"]
    command = [sys.executable, *launcher, "-m", "eval.processes", "--worker", str(options.work), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(options.work / "out")], env=environment, check=True)
    ranks = [json.loads((options.work / str(rank)).read_text()) for rank in range(size)]
    report = json.loads((options.work / "out" / "prune_report.json").read_text())
    return {"ranks": ranks, "seconds": report["seconds"], "processes": report["processes"]}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.processes", description="One run by one process and by several.")
    parser.add_argument("arguments", nargs="+", metavar="FLAG", help="of llmprune, behind --")
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[1, 2], metavar="N", help="processes (default: 1 2)"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="turns (default: 3)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the runs; removed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_processes(options: argparse.Namespace, given: Sequence[str]) -> int:
    """The command."""
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", "eval.processes", *given], options.out)
    load = os.getloadavg()[0]
    turns = [{str(size): run_with(size, options) for size in options.sizes} for _ in range(options.repeats)]
    found = {"load": [load, os.getloadavg()[0]], "cpus": os.cpu_count(), "turns": turns}
    say(table(record.write(options.out, stamp, found)))
    return 0


def table(result: dict[str, Any]) -> str:
    """Markdown: medians over the turns, and how often the time of one process goes into that of several."""
    turns = result["turns"]
    lines = [
        "| processes | whole run, s | pruning, s | processor time of the busiest, s | less wall | less processor |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for size in turns[0]:
        whole = statistics.median(_whole(turn[size]) for turn in turns)
        prune = statistics.median(turn[size]["seconds"]["prune"] for turn in turns)
        busiest = statistics.median(_busiest(turn[size]) for turn in turns)
        wall = statistics.median(_whole(turn["1"]) / _whole(turn[size]) for turn in turns)
        cpu = statistics.median(_busiest(turn["1"]) / _busiest(turn[size]) for turn in turns)
        lines.append(f"| {size} | {whole:.0f} | {prune:.0f} | {busiest:.0f} | {wall:.2f} x | {cpu:.2f} x |")
    load = " to ".join(f"{value:.1f}" for value in result["load"])
    lines += ["", f"Medians of {len(turns)} turns; one thread each, {result['cpus']} cores, load {load}."]
    return "\n".join(lines)


def _whole(run: dict[str, Any]) -> float:
    return float(max(rank["wall"] for rank in run["ranks"]))


def _busiest(run: dict[str, Any]) -> float:
    return float(max(rank["cpu"] for rank in run["ranks"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--worker"]:
        return serve(Path(given[1]), given[2:])
    return run_command(build_parser(), lambda options: run_processes(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
