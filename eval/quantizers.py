"""`python -m eval.quantizers`: our int4 weights and those of GPTQ in LLM Compressor, on the same tokens.

The peer runs in its own environment, see `eval.peers`. Both models are evaluated by one plain transformers computation,
which reads our codes with the library of compressed-tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import record
from eval.peers import PEERS, describe_tokens, execute, existing, peer_python, report, token_file
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, seed, window

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
    add = parser.add_argument
    add("--model", type=existing, required=True, help="folder of the dense model")
    add("--calib", type=existing, required=True, help="text to calibrate on, or a frozen token file (.safetensors)")
    add("--eval", type=existing, nargs="+", required=True, help="texts to measure perplexity on")
    add("--group", type=positive, default=64, help="inputs of a row that share a scale (default: 64)")
    add("--samples", type=positive, default=32, help="calibration windows taken from a text (default: 32)")
    add("--seq-len", type=window, default=512, help="tokens per calibration window (default: 512)")
    add("--seed", type=seed, default=0, help="choice of windows (default: 0)")
    add("--threads", type=positive, default=1, help="CPU threads each tool may use (default: 1)")
    add("--eval-context", type=window, default=1024, help="tokens per evaluation window (default: 1024)")
    add("--eval-windows", type=positive, default=12, help="windows, from the start of a text (default: 12)")
    add("--peer-python", type=existing, help="Python that has the peer (default: made once in the cache folder)")
    add("--out", type=Path, help="file that receives the whole result as JSON")
    add("--work", type=Path, help="folder for tokens, logs and models (default: a temporary one)")
    add("--debug", action="store_true", help="show the traceback of an error")
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
    execute(command, options.threads, work / "peer.log", "see the log")
    for name, flags in OURS.items():
        report(f"llmprune, {name}")
        folders[f"llmprune, {name}"] = out = work / name
        command = [sys.executable, "-m", "llmprune", "--model", options.model, "--calib", tokens, "--no-eval"]
        command += ["--sparsity", "none", "--quantize", f"int4:g{options.group}", "--threads", options.threads]
        execute([*command, "--out", out, "--overwrite", "--quiet", *flags], options.threads, work / f"{name}.log", "")
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
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", "eval.quantizers", *given], options.out)
    with tempfile.TemporaryDirectory(prefix="llmprune-quantizers-") as scratch:
        work = (options.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        result = record.write(options.out, stamp, study(options, work))
    say(table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: compare(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
