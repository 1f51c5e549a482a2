"""`python -m eval.solvers MODEL --calib SRC`: SparseGPT, our ADMM and ALPS on the very same layers.

The layers are those of some of the model's blocks, with the dense model's own inputs. Every layer is solved by each.
The figures are relative output errors, and by which fraction of what ALPS, with up to 300 iterations, takes from
SparseGPT's error our ADMM lowers it. ALPS is the slow form of the paper, in float64 (`eval/alps.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import record
from eval.models import find_model, load_stock
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, seed, window
from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.pruning.pattern import SparsityPattern
    from llmprune.pruning.problem import GroupProblem

DAMPING = 0.01
"""ALPS's; the paper's, and our ADMM's."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.solvers", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="model folder, Hub id, .gguf file, or demo")
    parser.add_argument("--calib", required=True, metavar="SRC", help="text: a file, a folder or a data set name")
    parser.add_argument("--samples", type=positive, default=32, metavar="N", help="windows of text (default: 32)")
    parser.add_argument("--seq-len", type=window, default=512, metavar="N", help="tokens in each (default: 512)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="choice of windows (default: 0)")
    parser.add_argument("--blocks", type=int, nargs="+", required=True, metavar="N", help="numbers of blocks, from 0")
    parser.add_argument("--sparsity", nargs="+", default=["2:4"], metavar="S", help="patterns (default: 2:4)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def gather(options: argparse.Namespace) -> tuple[list[GroupProblem], str]:
    """The layers of the blocks that share their inputs, with the Grams of these; and the hash of the tokens."""
    import torch

    from llmprune.progress import Progress
    from llmprune.pruning.problem import GroupProblem, LayerProblem
    from llmprune.pruning.statistics import RunningGram
    from llmprune.sources.demo import default_cache
    from llmprune.sources.models import load_tokenizer
    from llmprune.sources.texts import Reader
    from llmprune.sources.tokens import calibration_tokens

    source = find_model(options.model)
    model = load_stock(source.folder, dtype=torch.float32)
    sizes = {"samples": options.samples, "seq_len": options.seq_len, "seed": options.seed}
    batch = calibration_tokens(
        options.calib, Reader(load_tokenizer(source, False), default_cache(), Progress()), **sizes
    )
    prefixes = tuple(f"model.layers.{block}." for block in options.blocks)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefixes)
    }
    for block, prefix in zip(options.blocks, prefixes, strict=True):
        if not any(name.startswith(prefix) for name in layers):
            raise InputError(f"{options.model} has no linear layers in {prefix}*", f"name other --blocks than {block}")
    grams: dict[str, RunningGram] = {}
    sharing: dict[str, list[str]] = defaultdict(list)
    seen: dict[int, str] = {}

    def watch(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        first = seen.setdefault(id(inputs[0]), name)
        if name not in sharing[first]:
            sharing[first].append(name)
        if first == name:
            grams.setdefault(name, RunningGram(inputs[0].shape[-1], torch.device("cpu"))).add(inputs[0])
        alive.append(inputs[0])

    alive: list[torch.Tensor] = []  # so that no other tensor gets the id of one of them
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: watch(name, module, inputs))
    for tokens in batch.tokens:
        model.model(tokens[None], use_cache=False)
        seen.clear()
        alive.clear()
    return [
        GroupProblem(tuple(LayerProblem(name, layers[name].weight.detach()) for name in names), grams[first].result())
        for first, names in sharing.items()
    ], batch.provenance.sha256


def compare(problem: GroupProblem, pattern: SparsityPattern) -> list[dict[str, Any]]:
    """Relative errors of the layers of one group by every solver, and the solvers' seconds for the whole group."""
    from eval.alps import alps
    from llmprune.pruning.linalg import relative_error
    from llmprune.pruning.methods import load_method
    from llmprune.pruning.problem import InputStats

    seconds, weights = {}, {}
    for name in ("sparsegpt", "admm", "alps"):
        begun = time.perf_counter()
        if name == "alps":
            weights[name] = [alps(layer.weight, problem.stats.gram, pattern, DAMPING) for layer in problem.layers]
        else:
            weights[name] = [found.weight for found in load_method(name).solve(problem, pattern)]
        seconds[name] = time.perf_counter() - begun
    exact = InputStats(problem.stats.tokens, problem.stats.gram.double())
    return [
        {
            "layer": layer.name,
            "errors": {
                name: relative_error(layer.weight.double(), found[at].double(), exact)
                for name, found in weights.items()
            },
            "seconds": {name: spent / len(problem.layers) for name, spent in seconds.items()},
        }
        for at, layer in enumerate(problem.layers)
    ]


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Solve every layer by every solver for every pattern."""
    import torch

    from llmprune.pruning.sparsity import parse_sparsity

    silence_libraries(options.debug)
    torch.set_num_threads(options.threads)
    patterns = {}
    for text in options.sparsity:
        asked = parse_sparsity(text)
        if asked.removals or asked.pattern is None:
            raise InputError(f"{text} removes inputs, but ALPS chooses weights", "name patterns such as 2:4 or 50%")
        patterns[text] = asked.pattern
    stamp = record.stamp(["python", "-m", "eval.solvers", *given], options.out)
    with torch.no_grad():
        problems, digest = gather(options)
        solved = [
            {"sparsity": text, **row}
            for text, pattern in patterns.items()
            for problem in problems
            for row in compare(problem, pattern)
        ]
    result = record.write(options.out, stamp, {"tokens_sha256": digest, "solved": solved})
    say(json.dumps(result, indent=2) if options.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Markdown: by pattern and kind of layer, mean errors, what part of ALPS's gain ADMM has, and the seconds."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in result["solved"]:
        kinds[row["sparsity"], row["layer"].rpartition(".")[2]].append(row)
        kinds[row["sparsity"], "all"].append(row)
    head = [
        "sparsity",
        "layers",
        "sparsegpt",
        "admm",
        "alps",
        "recovered, of ALPS's",
        "seconds of sparsegpt, admm, alps",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|--:|--:|--:|--:|---|"]
    for (sparsity, kind), rows in sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1] == "all")):
        errors = [sum(row["errors"][name] for row in rows) / len(rows) for name in ("sparsegpt", "admm", "alps")]
        seconds = [sum(row["seconds"][name] for row in rows) for name in ("sparsegpt", "admm", "alps")]
        part = (errors[0] - errors[1]) / (errors[0] - errors[2])
        figures = " | ".join(f"{error:.4f}" for error in errors)
        spent = ", ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {sparsity} | {len(rows)} {kind} | {figures} | {part:.0%} | {spent} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
