"""`python -m eval.zero_shot MODEL [MODEL ...] --tasks TASK[,TASK ...]`: accuracy on tasks, without training.

A task is a .jsonl file, scored here by log-likelihood (or, with --harness, by lm-evaluation-harness), or the name or
.yaml file of a task of that harness (`pip install -e ".[harness]"`; flags and figures are those of `lm_eval`). A .jsonl
file has one JSON object a line:

    {"query": "Question: ...", "choices": ["...", "..."], "gold": 0}     the likeliest choice is the answer
    {"context": "...", "continuation": "word"}                           the greedy continuation is the answer
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import record
from eval.models import find_model, load_stock
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive

ANSWER = "\nAnswer:"
UP = {"aggregation": "mean", "higher_is_better": True}
DOWN = {"aggregation": "perplexity", "higher_is_better": False}


def build_parser() -> Parser:
    """The flags, named as those of `lm_eval`."""
    parser = Parser(
        prog="python -m eval.zero_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder, Hub id, .gguf file, or demo")
    parser.add_argument("--tasks", required=True, metavar="A,B", help=".jsonl files, or tasks of lm-evaluation-harness")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first questions of every task")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="worked examples (tasks of the harness only)")
    parser.add_argument("--harness", action="store_true", help="score .jsonl files by lm-evaluation-harness, too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that receives the result as JSON")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to be scored.

    Args:
        ids: of context and continuation.
        scored: how many tokens at the end are the continuation.
    """

    ids: list[int]
    scored: int


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether it is what greedy decoding would say."""

    loglikelihood: float
    greedy: bool


def read_task(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The questions of a file.

    Raises:
        InputError: no such file, or lines that are no questions.
    """
    from llmprune.errors import InputError
    from llmprune.sources.files import read_file

    try:
        questions = [json.loads(line) for line in read_file(path).splitlines() if line.strip()][:limit]
    except ValueError as error:
        raise InputError(f"{path} is not JSON line by line: {error}", "see python -m eval.zero_shot --help") from error
    kinds = {is_cloze(question) for question in questions}
    if None in kinds or len(kinds) > 1:
        raise InputError(
            f"{path} holds lines that are no questions, or questions of both kinds",
            "see python -m eval.zero_shot --help",
        )
    return questions


def is_cloze(question: Any) -> bool | None:
    """Whether a question asks for a continuation (True) or for one of some choices (False); None: it is no question."""
    if not isinstance(question, dict):
        return None
    if all(isinstance(question.get(key), str) for key in ("context", "continuation")):
        return True
    choices, gold = question.get("choices"), question.get("gold")
    whole = isinstance(question.get("query"), str) and isinstance(choices, list) and all(choices)
    return False if whole and isinstance(gold, int) and 0 <= gold < len(choices) else None


def request(context: str, continuation: str, tokenizer: Any, longest: int) -> Request:
    """Tokenised as one text, as lm-evaluation-harness does: spaces belong to the continuation; too long is cut left."""
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    head = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    scored = max(len(ids) - len(head), 1)
    return Request(ids[-longest:], min(scored, longest - 1))


def requests_of(question: dict[str, Any], tokenizer: Any, longest: int) -> list[Request]:
    """One request for each possible answer."""
    if is_cloze(question):
        return [request(question["context"], f" {question['continuation'].strip()}", tokenizer, longest)]
    context = question["query"].rstrip() + ANSWER
    return [request(context, f" {choice}", tokenizer, longest) for choice in question["choices"]]


def scores(model: Any, wanted: list[Request], batch_size: int) -> list[Score]:
    """Score all requests, texts of like length together, padded on the right (which a causal model does not see)."""
    found: dict[int, Score] = {}
    order = sorted(range(len(wanted)), key=lambda number: len(wanted[number].ids))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found |= zip(numbers, _batch_scores(model, [wanted[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(wanted))]


def _batch_scores(model: Any, batch: list[Request]) -> Iterator[Score]:
    import torch

    longest = max(len(one.ids) for one in batch)
    ids = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in batch], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    for one, row in zip(batch, logits, strict=True):
        end = len(one.ids)
        logs = row[end - one.scored - 1 : end - 1].float().log_softmax(-1).cpu()
        targets = torch.tensor(one.ids[-one.scored :])
        yield Score(float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(-1) == targets).all()))


def grade(questions: list[dict[str, Any]], answers: list[list[Score]]) -> dict[str, Any]:
    """Accuracy, by likelihood and by likelihood per character (`acc_norm`), with standard errors; perplexity of words.

    Args:
        questions: of one task.
        answers: the scores of each question's possible answers.
    """
    if is_cloze(questions[0]):
        right = [score.greedy for (score,) in answers]
        mean = sum(score.loglikelihood for (score,) in answers) / len(answers)
        return {"questions": len(questions), **_share("acc", right), "perplexity": math.exp(-mean)}
    plain, normed = [], []
    for question, found in zip(questions, answers, strict=True):
        values = [score.loglikelihood for score in found]
        per_character = [value / len(choice) for value, choice in zip(values, question["choices"], strict=True)]
        plain.append(values.index(max(values)) == question["gold"])
        normed.append(per_character.index(max(per_character)) == question["gold"])
    return {"questions": len(questions), **_share("acc", plain), **_share("acc_norm", normed)}


def _share(name: str, right: list[bool]) -> dict[str, float]:
    share = sum(right) / len(right)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(len(right) - 1, 1))}


def score_files(options: argparse.Namespace, model_name: str, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """The figures of every file."""
    import torch

    from llmprune.runtime.device import pick_device
    from llmprune.sources.models import load_tokenizer

    tasks = {path.stem: read_task(path, options.limit) for path in paths}
    device = pick_device(options.device)
    source = find_model(model_name)
    tokenizer = load_tokenizer(source, False)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = load_stock(source.folder, dtype=dtype).to(device)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None) or 2048
    result = {}
    for name, questions in tasks.items():
        groups = [requests_of(question, tokenizer, longest) for question in questions]
        flat = iter(scores(model, [one for group in groups for one in group], options.batch_size))
        result[name] = grade(questions, [[next(flat) for _ in group] for group in groups])
    return result


def harness_task(path: Path) -> dict[str, Any]:
    """A file as a task of lm-evaluation-harness that asks the very same."""
    kind = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation.strip()}}",
        "metric_list": [{"metric": "acc", **UP}, {"metric": "perplexity", **DOWN}],
    }
    if not is_cloze(read_task(path, 1)[0]):
        kind = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query.rstrip()}}" + ANSWER,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **UP}, {"metric": "acc_norm", **UP}],
        }
    files = {"data_files": {"test": str(path.resolve())}}
    return {"task": path.stem, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **kind}


def ask_harness(options: argparse.Namespace, model_name: str, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """The figures of lm-evaluation-harness.

    Raises:
        InputError: it is not installed, does not know a task, or cannot read its data.
    """
    from llmprune.errors import InputError

    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            f"{tasks[0]} is for lm-evaluation-harness, which is not installed",
            'name .jsonl files, or: pip install -e ".[harness]"',
        ) from error
    source = find_model(model_name)
    # The harness ends its worker processes by this signal; our handler would make each of them show a traceback.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asked = [harness_task(Path(task)) if task.endswith(".jsonl") else task for task in tasks]
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(source.folder), "dtype": "float32" if options.device == "cpu" else "auto"},
            tasks=asked,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
            bootstrap_iters=1000,
        )
    except (OSError, KeyError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"lm-evaluation-harness cannot do {', '.join(tasks)}: {said}",
            "its tasks' data come from the Hugging Face Hub; without it, name .jsonl files (--harness)",
        ) from error
    # "acc,none" is the figure `acc` after the filter `none`; a figure without a standard error has "N/A" for it.
    return {
        task: {key.removesuffix(",none"): value for key, value in figures.items() if isinstance(value, float)}
        for task, figures in found["results"].items()
    }


def table(found: dict[str, Any]) -> str:
    """A Markdown table, a column a model."""
    results = found["results"]
    lines = [f"| task | figure | {' | '.join(results)} |", "|---|---|" + "--:|" * len(results)]
    for task, figures in next(iter(results.values())).items():
        for name, value in figures.items():
            if isinstance(value, float) and not name.endswith("_stderr"):
                cells = [_cell(result[task], name) for result in results.values()]
                lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figures: dict[str, float], name: str) -> str:
    error = figures.get(f"{name}_stderr")
    return f"{figures[name]:.4g}{f' ± {error:.2g}' if error is not None else ''}"


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Score, write and print."""
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", "eval.zero_shot", *given], options.out)
    tasks = [task for task in options.tasks.split(",") if task]
    files = [task for task in tasks if task.endswith(".jsonl") and not options.harness]
    others = [task for task in tasks if task not in files]
    results = {}
    for model in options.models:
        result = score_files(options, model, [Path(file) for file in files]) if files else {}
        results[Path(model).name] = result | (ask_harness(options, model, others) if others else {})
    found = record.write(options.out, stamp, {"limit": options.limit, "results": results})
    say(json.dumps(found, indent=2) if options.json else table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
