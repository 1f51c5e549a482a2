"""`python -m eval.quantizers`: our int4 weights and those of GPTQ in LLM Compressor, on the same tokens.

The peer runs in its own environment, see `eval.peers`. Both models are evaluated by one plain transformers computation,
which reads our codes with the library of compressed-tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.peers import (
    OUR_HINT,
    PEERS,
    add_shared,
    describe_tokens,
    execute,
    existing,
    peer_python,
    recorded,
    report,
    token_file,
)
from llmprune.cli.shell import Parser, run_command, say
from llmprune.cli.values import positive

PEER, ROUNDED, PRUNED = "GPTQ of LLM Compressor", "rounding of LLM Compressor", "pruned"
OURS = {
    "GPTQ": ["--effort", "fast", "--grid-passes", "0"],
    "fast": ["--effort", "fast"],
    "balanced": ["--effort", "balanced"],
}
"""Our settings, by the names under which they are told."""
AFTER, JOINT = "llmprune quantize, ", "llmprune, both at once, "
BEHIND = {"GPTQ": OURS["GPTQ"], "balanced": OURS["balanced"]}
"""The settings for a model that was pruned before."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.quantizers", description="Compare int4 weights with GPTQ.", allow_abbrev=False)
    add_shared(parser, samples=32, threads=1)
    parser.add_argument("--eval", type=existing, nargs="+", required=True, help="texts to measure perplexity on")
    parser.add_argument("--group", type=positive, default=64, help="inputs of a row that share a scale (default: 64)")
    parser.add_argument(
        "--sparsity", default="none", help="pattern: pruned by us first, then quantised by each; and both at once"
    )
    return parser


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of a study.

    Args:
        options: of the command line.
        work: where everything goes.
        tokens: the calibration windows.
        python: of the peer.
    """

    options: argparse.Namespace
    work: Path
    tokens: Path
    python: Path

    def peer(self, name: str, model: Path, *flags: str) -> Path:
        """Quantise a model by the peer; the folder."""
        report(f"{name}: int4, groups of {self.options.group}")
        peer, folder = PEERS["llmcompressor"], self.work / name.partition(" ")[0].lower()
        command: list[Any] = [self.python, "-I", peer.worker, "--model", model, "--tokens", self.tokens]
        command += ["--sparsity", "none", "--int4-group", self.options.group, "--threads", self.options.threads]
        command += ["--out", folder, "--report", self.work / "peer.json", *flags]
        hint = f"--peer-python must name a Python that has {' and '.join(peer.packages)}"
        execute(command, self.options.threads, folder.with_suffix(".log"), hint)
        return folder

    def ours(self, name: str, *flags: Any) -> Path:
        """One of our own runs; the folder."""
        report(name)
        folder = self.work / name.replace(", ", "-").replace(" ", "-")
        command = [sys.executable, "-m", "llmprune", *flags, "--calib", self.tokens, "--no-eval"]
        command += ["--threads", self.options.threads, "--out", folder, "--overwrite", "--quiet"]
        execute(command, self.options.threads, folder.with_suffix(".log"), OUR_HINT)
        return folder


def study(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantise by every tool and setting, then evaluate."""
    tokens = token_file(options, work)
    runs = Runs(options, work, tokens, peer_python(PEERS["llmcompressor"], options.peer_python))
    folders = (dense_runs if options.sparsity == "none" else sparse_runs)(runs)
    return {
        "grid": f"int4:g{options.group}",
        "sparsity": options.sparsity,
        "threads": options.threads,
        "versions": json.loads((work / "peer.json").read_text(encoding="utf-8"))["versions"],
        "tokens": describe_tokens(tokens),
        "perplexity": evaluate(options, {"dense": options.model, **folders}),
    }


def dense_runs(runs: Runs) -> dict[str, Path]:
    """The folders of a dense model that is only quantised."""
    model, grid = runs.options.model, f"int4:g{runs.options.group}"
    found = {PEER: runs.peer(PEER, model)}
    for name, flags in OURS.items():
        whole = f"llmprune, {name}"
        found[whole] = runs.ours(whole, "--model", model, "--sparsity", "none", "--quantize", grid, *flags)
    return found


def sparse_runs(runs: Runs) -> dict[str, Path]:
    """The folders of a model that is pruned and then quantised, or both at once."""
    model, grid, sparsity = runs.options.model, f"int4:g{runs.options.group}", runs.options.sparsity
    pruned = runs.ours(PRUNED, "--model", model, "--sparsity", sparsity, "--effort", "balanced")
    found = {PRUNED: pruned, ROUNDED: runs.peer(ROUNDED, pruned, "--round"), PEER: runs.peer(PEER, pruned)}
    for name, flags in BEHIND.items():
        found[AFTER + name] = runs.ours(AFTER + name, "quantize", pruned, grid, *flags)
    name = f"{JOINT}balanced"
    found[name] = runs.ours(name, "--model", model, "--sparsity", sparsity, "--quantize", grid, *OURS["balanced"])
    return found


def evaluate(options: argparse.Namespace, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Perplexity of every folder on every text; only now is torch imported."""
    import torch

    from eval import judge

    torch.set_num_threads(options.threads)
    texts = {
        path.name: judge.first_windows(
            path.read_text(encoding="utf-8"), options.model, options.eval_windows, options.eval_context
        )
        for path in options.eval
    }
    found: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        model = judge.load_model(folder)
        losses = {text: judge.window_losses(model, windows) for text, windows in texts.items()}
        found[name] = {text: math.exp(sum(each) / len(each)) for text, each in losses.items()}
    return found


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table: perplexities, and the fraction of the peer's damage that is undone.

    Damage is what quantisation adds to the log perplexity of the model that was quantised.
    """
    perplexity = result["perplexity"]
    texts, before = list(perplexity["dense"]), PRUNED if PRUNED in perplexity else "dense"
    pattern = result.get("sparsity", "none")
    title = result["grid"] if pattern == "none" else f"{pattern}, {result['grid']}"
    lines = [f"| {title} | {' | '.join(texts)} |", f"|---|{'--:|' * len(texts)}"]
    for name, values in perplexity.items():
        cells = []
        for text in texts:
            dense, peer, own = (math.log(perplexity[key][text]) for key in (before, PEER, name))
            undone = f" ({(peer - own) / (peer - dense):.2f})" if name not in ("dense", PRUNED, PEER) else ""
            cells.append(f"{values[text]:.2f}{undone}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run the study; write and print its result."""
    say(table(recorded("eval.quantizers", options, given, study)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: compare(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
