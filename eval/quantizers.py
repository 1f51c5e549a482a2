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

PEER = "GPTQ of LLM Compressor"
OURS = {
    "GPTQ": ["--effort", "fast", "--grid-passes", "0"],
    "fast": ["--effort", "fast"],
    "balanced": ["--effort", "balanced"],
}
"""Our settings, by the names under which they are told."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.quantizers", description="Compare int4 weights with GPTQ.", allow_abbrev=False)
    add_shared(parser, samples=32, threads=1)
    parser.add_argument("--eval", type=existing, nargs="+", required=True, help="texts to measure perplexity on")
    parser.add_argument("--group", type=positive, default=64, help="inputs of a row that share a scale (default: 64)")
    return parser


def study(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantise by every tool and setting, then evaluate."""
    tokens, peer = token_file(options, work), PEERS["llmcompressor"]
    python = peer_python(peer, options.peer_python)
    folders = {"dense": options.model, PEER: work / "peer"}
    report(f"{PEER}: int4, groups of {options.group}")
    command = [python, "-I", peer.worker, "--model", options.model, "--tokens", tokens, "--sparsity", "none"]
    command += ["--int4-group", options.group, "--threads", options.threads]
    command += ["--out", work / "peer", "--report", work / "peer.json"]
    execute(
        command,
        options.threads,
        work / "peer.log",
        f"--peer-python must name a Python that has {' and '.join(peer.packages)}",
    )
    for name, flags in OURS.items():
        report(f"llmprune, {name}")
        folders[f"llmprune, {name}"] = out = work / name
        command = [sys.executable, "-m", "llmprune", "--model", options.model, "--calib", tokens, "--no-eval"]
        command += ["--sparsity", "none", "--quantize", f"int4:g{options.group}", "--threads", options.threads]
        execute(
            [*command, "--out", out, "--overwrite", "--quiet", *flags], options.threads, work / f"{name}.log", OUR_HINT
        )
    return {
        "grid": f"int4:g{options.group}",
        "threads": options.threads,
        "versions": json.loads((work / "peer.json").read_text(encoding="utf-8"))["versions"],
        "tokens": describe_tokens(tokens),
        "perplexity": evaluate(options, folders),
    }


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
    """The result as a Markdown table: perplexities, and the fraction of the peer's damage that is undone."""
    perplexity = result["perplexity"]
    texts = list(perplexity["dense"])
    lines = [f"| {result['grid']} | {' | '.join(texts)} |", f"|---|{'--:|' * len(texts)}"]
    for name, values in perplexity.items():
        cells = []
        for text in texts:
            dense, peer, own = (math.log(perplexity[key][text]) for key in ("dense", PEER, name))
            undone = f" ({(peer - own) / (peer - dense):.2f})" if name not in ("dense", PEER) else ""
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
