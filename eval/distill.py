"""`python -m eval.distill PRUNED --work DIR --text SRC [SRC ...] -- FLAGS`: what a distillation is worth.

Runs `llmprune distill PRUNED FLAGS` (or goes on with it, or takes its result), then measures the dense model, the
pruned one and the distilled one on the same texts. The *undone* fraction of the pruned model's increase in log
perplexity is `ln(pruned / distilled) / ln(pruned / dense)`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval import record
from llmprune.cli.flags import distill_parser, make_distill_job
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, window


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.distill", description="Measure what a distillation is worth.")
    parser.add_argument("pruned", type=Path, metavar="PRUNED", help="pruned folder")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the distilled one")
    parser.add_argument("--dense", default="demo", metavar="MODEL", help="the teacher (default: demo)")
    parser.add_argument("--text", nargs="+", required=True, metavar="SRC", help="text files or data set names")
    parser.add_argument("--windows", type=positive, default=12, metavar="N", help="windows per text (default: 12)")
    parser.add_argument("--context", type=window, default=1024, metavar="N", help="tokens per window (default: 1024)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to record the result (JSON)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def study(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Distil, then measure all three models."""
    from eval.perplexity import measure
    from llmprune.cli.terminal import TerminalProgress
    from llmprune.pipeline.distill.run import distill

    out = options.work / f"{options.pruned.name}-distilled"
    words = [str(options.pruned), "--teacher", options.dense, "--out", str(out), *flags]
    report = distill(make_distill_job(distill_parser().parse_args(words), ["distill", *words]), TerminalProgress())
    folders = {"dense": options.dense, "pruned": str(options.pruned), "distilled": str(out)}
    found = {name: measure(folder, options.text, options.windows, options.context) for name, folder in folders.items()}
    facts = {key: value for key, value in report.distillation.items() if key not in {"fingerprint", "evaluation"}}
    return {"sparsity": report.sparsity["pattern"], "distillation": facts, "perplexity": found, "undone": undone(found)}


def undone(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The fraction of the pruned model's increase in log perplexity that is undone, by text."""
    logs = {name: {text: math.log(one["value"]) for text, one in texts.items()} for name, texts in found.items()}
    return {
        text: (logs["pruned"][text] - logs["distilled"][text]) / (logs["pruned"][text] - dense)
        for text, dense in logs["dense"].items()
    }


def table(result: dict[str, Any]) -> str:
    """The three models' perplexities as a Markdown table, with what is undone; and the held-out divergence."""
    found, facts = result["perplexity"], result["distillation"]
    texts = list(result["undone"])
    lines = [f"| {result['sparsity']} | {' | '.join(texts)} |", f"|---|{'--:|' * len(texts)}"]
    for name, one in found.items():
        values = [f"{one[text]['value']:.2f} ± {one[text]['error']:.2f}" for text in texts]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines.append(f"| undone | {' | '.join(f'{value:.2f}' for value in result['undone'].values())} |")
    course = ", ".join(f"{one['divergence']:.4f} ({one['step']})" for one in facts["divergences"])
    told = (
        f"{facts['tokens']:,} tokens, {facts['batch_size']} windows a step, learning rate {facts['learning_rate']:g}, "
        f"{facts['threads']} threads, {facts['seconds']['train']:,.0f} s. Held-out divergence in nats a token "
        f"(behind so many steps): {course}."
    )
    return "\n".join([*lines, "", told])


def run_study(
    name: str,
    parser: Parser,
    study: Callable[[argparse.Namespace, Sequence[str]], dict[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """Run and record a study whose command line ends with `--` and flags of `llmprune distill`; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)

    def run(options: argparse.Namespace) -> int:
        silence_libraries(options.debug)
        stamp = record.stamp(["python", "-m", name, *given], options.out)
        say(json.dumps(record.write(options.out, stamp, study(options, given[at + 1 :])), indent=2))
        return 0

    return run_command(parser, run, given[:at])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_study("eval.distill", build_parser(), study, argv)


if __name__ == "__main__":
    raise SystemExit(main())
