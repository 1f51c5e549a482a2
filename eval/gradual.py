"""`python -m eval.gradual MODEL STEP [STEP ...] --tokens N --work DIR --text SRC -- FLAGS`: gradually or at once.

Steps are ratios of the dense model, such as `channels:25% channels:40% channels:50%` or `50% 60% 70%`. Gradually: prune
to the first, distil, prune that further, and so on, each time with the same share of the N tokens. At once: prune to
the last one, distil with all N. The teacher is always the dense model. Perplexities are measured behind every stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from eval.distill import run_study, undone
from llmprune.cli.flags import distill_parser, make_distill_job
from llmprune.cli.shell import Parser
from llmprune.cli.values import positive, window
from llmprune.errors import InputError
from llmprune.pruning.sparsity import Removal, parse_sparsity

HINT = "steps are patterns such as 50% 60% 70%, or one kind of removal: channels:25% channels:40%"


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.gradual", description="Prune and distil by turns, or each once.")
    parser.add_argument("model", metavar="MODEL", help="the dense model")
    parser.add_argument("steps", nargs="+", metavar="STEP", help="sparsities, rising")
    parser.add_argument("--tokens", type=positive, required=True, metavar="N", help="tokens of distillation in all")
    parser.add_argument("--calib", required=True, metavar="SRC", help="text to calibrate on and to distil with")
    parser.add_argument("--samples", type=positive, default=32, metavar="N", help="calibration windows (default: 32)")
    parser.add_argument("--seq-len", type=window, default=512, metavar="N", help="tokens per window (default: 512)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="choice of windows (default: 0)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the models; resumable")
    parser.add_argument("--text", nargs="+", required=True, metavar="SRC", help="texts to measure perplexity on")
    parser.add_argument("--windows", type=positive, default=12, metavar="N", help="windows per text (default: 12)")
    parser.add_argument("--context", type=window, default=1024, metavar="N", help="tokens per window (default: 1024)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to record the result (JSON)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def further(step: str, before: str | None) -> str:
    """What a model that was pruned to `before` must lose to be at `step`, where both are ratios of the dense model.

    Zeros count, so a pattern stays as it is; of removed parts a ratio r behind b is (r - b) / (1 - b) of the rest.

    Raises:
        InputError: it is no such ratio, or less than before.
    """
    asked = parse_sparsity(step)
    if asked.pattern is not None and not asked.removals:
        return step
    if asked.pattern is not None or len(asked.removals) != 1 or asked.size is not None or asked.removals[0].count:
        raise InputError(f"{step!r} is no single ratio", HINT)
    (removal,) = asked.removals
    if before is None:
        return step
    (last,) = parse_sparsity(before).removals
    if last.kind != removal.kind or last.ratio >= removal.ratio:
        raise InputError(f"{step!r} does not remove more than {before!r}", HINT)
    ratio = (removal.ratio - last.ratio) / (1 - last.ratio)
    return Removal(removal.kind, Fraction(round(ratio * 10**4), 10**4)).name


def stages(steps: Sequence[str], tokens: int) -> Iterator[tuple[str, str, int]]:
    """For the gradual path the name of every folder, what is pruned from the one before, and tokens to distil with."""
    for number, (step, before) in enumerate(zip(steps, [None, *steps[:-1]], strict=True), 1):
        yield f"gradual-{number}", further(step, before), tokens // len(steps)


def study(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Take both paths; perplexities and what is undone, behind every stage."""
    options.work.mkdir(parents=True, exist_ok=True)
    paths = {
        "gradual": list(stages(options.steps, options.tokens)),
        "at once": [("at-once", options.steps[-1], options.tokens)],
    }
    dense = measured(options, options.model)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, path in paths.items():
        source, found[name] = options.model, []
        for folder, sparsity, tokens in path:
            source, stage = taken(options, source, options.work / folder, (sparsity, tokens), flags)
            triple = {"dense": dense, "pruned": stage["pruned"], "distilled": stage["distilled"]}
            found[name].append({"sparsity": sparsity, "tokens": tokens, **stage, "undone": undone(triple)})
    return {"steps": options.steps, "tokens": options.tokens, "dense": dense, "paths": found}


def taken(
    options: argparse.Namespace, source: str, out: Path, what: tuple[str, int], flags: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """One stage: prune `source`, then distil; what is there already is taken. The new folder, and perplexities."""
    from llmprune import prune
    from llmprune.cli.flags import build_parser, make_job
    from llmprune.cli.terminal import TerminalProgress
    from llmprune.pipeline.distill.run import distill

    sparsity, tokens = what
    shared = ["--calib", options.calib, "--seq-len", str(options.seq_len), "--seed", str(options.seed), "--no-eval"]
    words = ["--model", source, "--sparsity", sparsity, "--effort", "balanced", "--samples", str(options.samples)]
    words += [*shared, "--out", str(out)]
    prune(make_job(build_parser().parse_args(words), words), TerminalProgress())
    distilled = out.with_name(f"{out.name}-distilled")
    words = [str(out), "--teacher", options.model, "--tokens", str(tokens), *shared, "--out", str(distilled), *flags]
    report = distill(make_distill_job(distill_parser().parse_args(words), ["distill", *words]), TerminalProgress())
    facts = {
        "parameters": report.model["parameters_left"],
        "divergence": {name: report.distillation[f"divergence_{name}"] for name in ("before", "after")},
    }
    found = {"pruned": measured(options, str(out)), "distilled": measured(options, str(distilled))}
    return str(distilled), {**facts, **found}


def measured(options: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """The perplexity of a model by text."""
    from eval.perplexity import measure

    return measure(model, options.text, options.windows, options.context)


def table(result: dict[str, Any]) -> str:
    """Perplexities behind every stage as a Markdown table."""
    texts = list(result["dense"])
    behind = " | ".join(f"{text}, {name}" for text in texts for name in ("pruned", "distilled"))
    lines = [f"| path | pruned | tokens | parameters | {behind} |", f"|---|---|--:|--:|{'--:|' * (2 * len(texts))}"]
    for path, stages in result["paths"].items():
        for stage in stages:
            values = [f"{stage[name][text]['value']:.2f}" for text in texts for name in ("pruned", "distilled")]
            cells = [path, stage["sparsity"], f"{stage['tokens']:,}", f"{stage['parameters']:,}", *values]
            lines.append(f"| {' | '.join(cells)} |")
    dense = ", ".join(f"{value['value']:.2f} on {text}" for text, value in result["dense"].items())
    return "\n".join([*lines, "", f"Dense: {dense}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_study("eval.gradual", build_parser(), study, argv)


if __name__ == "__main__":
    raise SystemExit(main())
