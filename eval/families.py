"""`python -m eval.families`: prune a tiny random model of every type that transformers registers; a table of coverage.

The types are those that AutoModelForCausalLM and AutoModelForImageTextToText know. Each runs in a process of its own,
with limits of time and memory: a random model (`eval.tiny`) is saved as transformers saves it and pruned 2:4; then the
written files are read with transformers alone. Coverage is the share of the weights in the blocks (of two and more
dimensions, embeddings left out) that hold 2:4 along their inputs. A type that has a row is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import record
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, size
from llmprune.errors import PruneError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

OUT = record.RESULTS / "families.jsonl"
KINDS = {"AutoModelForCausalLM": "causal", "AutoModelForImageTextToText": "image and text"}
BESIDE = re.compile(r"vision|visual|image|audio|vqmodel|projector")
"""In names of what lies beside the language model, where a model counts it among the decoder's parts."""
PRUNED, REFUSED, UNBUILT = "pruned", "refused", "not built"
FAILED, WRONG, STOPPED = "failed", "wrong", "stopped"
"""Outcomes. The first three are as they should be: the others are faults of llmprune, or of this script."""


def types() -> list[tuple[str, str]]:
    """All registered types, each with its automatic class; twice where the two have classes of their own for it."""
    from transformers.models.auto import modeling_auto as auto

    causal, wrappers = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    first, second = KINDS
    return [(name, first) for name in sorted(causal)] + [
        (name, second) for name in sorted(wrappers) if causal.get(name) != wrappers[name]
    ]


def run_type(name: str, loader: str, folder: Path) -> dict[str, Any]:
    """Prune a tiny model of a type; what came of it."""
    import torch
    import transformers

    from eval import tiny

    source = folder / "source"
    try:
        torch.manual_seed(0)
        config = tiny.tiny_config(name)
        model = tiny.shaken(
            getattr(transformers, loader).from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        )
        model.save_pretrained(source)
    except Exception as error:
        return _without_model(name, source, error)
    found = {"class": type(model).__name__}
    try:
        return {**found, **_pruned(source, folder)}
    except PruneError as error:
        return {**found, "outcome": REFUSED, "reason": error.message}
    except Exception as error:
        return {**found, "outcome": FAILED, "reason": _where(error)}


def _without_model(name: str, source: Path, error: Exception) -> dict[str, Any]:
    """What llmprune says of a type of which transformers makes no model here: to its config, if there is one."""
    import torch
    from transformers import AutoConfig

    from llmprune.model.skeleton import build_on_meta
    from llmprune.sources.models import read_config, refuse_non_decoders

    unbuilt = {"outcome": UNBUILT, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    try:
        AutoConfig.for_model(name).save_pretrained(source)
    except Exception:
        return unbuilt
    try:
        config = read_config(source, trust_remote_code=False)
        refuse_non_decoders(config)
        build_on_meta(config, torch.float32)
    except PruneError as refusal:
        return {"outcome": REFUSED, "reason": refusal.message}
    except Exception as failure:
        return {"outcome": FAILED, "reason": _where(failure)}
    return unbuilt


def _where(error: Exception) -> str:
    """An error, and the last line of ours that it passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "llmprune" in Path(frame.filename).parts]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {first_line(error)[:200]}{place}"


def _pruned(source: Path, folder: Path) -> dict[str, Any]:
    """Prune a model; its coverage from the files, what the report says stays dense, and whether the stream is exact."""
    import torch

    from eval import tiny
    from llmprune import prune
    from llmprune.job import Job

    calib, out = tiny.token_file(folder / "tokens.safetensors"), folder / "out"
    job = Job(
        str(source), "2:4", calib=str(calib), out=out, device="cpu", evaluate=False, method="sparsegpt", effort="fast"
    )
    report = prune(job)
    tokens = tiny.random_tokens(2, seed=3)
    dense, pruned = tiny.reload(source), tiny.reload(out)
    whole = tiny.whole_logits(dense, tokens)
    exact = torch.equal(tiny.streamed_logits(tiny.skeleton_of(source), tokens), whole)
    finite = bool(torch.isfinite(tiny.whole_logits(pruned, tokens)).all())
    held = held_weights(pruned)
    covered, weights = (sum(part) for part in zip(*held.values(), strict=True))
    skipped = report.coverage["skipped"]
    faults = [
        text
        for text, wrong in {
            "the stream differs from the whole model": not exact,
            "the reloaded model gives NaN or Inf": not finite,
            f"the report counts {report.coverage['covered']} weights": covered != report.coverage["covered"],
            f"nothing is said of {weights - covered - sum(skipped.values())} weights": weights
            != covered + sum(skipped.values()),
        }.items()
        if wrong
    ]
    return {
        "outcome": WRONG if faults else PRUNED,
        "reason": "; ".join(faults),
        "covered": covered,
        "weights": weights,
        "dense": skipped,
        "at_default_sizes": at_default_sizes(dense.config.model_type, type(dense).__name__, held),
    }


def held_weights(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of every weight in the blocks of a model how many of its values are in matrices that hold 2:4, and how many all.

    Blocks are the items of a list of modules inside of the language model; a weight has two or more dimensions.
    """
    kind = model.config.get_text_config().model_type  # type: ignore[operator, union-attr]
    return {
        name: (sum(matrix.numel() for matrix in matrices(kind, owner, name, weight) if holds(matrix)), weight.numel())
        for name, owner, weight in block_weights(model)
    }


def block_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Names, owners and values of the weights in the blocks of the language model of a model."""
    from torch import nn

    lists = [(f"{name}.", part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    decoder = set(model.get_decoder().modules())  # type: ignore[operator]
    inside = [(name, part) for name, part in lists if part in decoder] or lists
    blocks = tuple(
        name for name, part in inside if not BESIDE.search(name) and any(True for item in part for _ in item.children())
    )
    for name, weight in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if weight.dim() > 1 and name.startswith(blocks) and not isinstance(owner, nn.Embedding):
            yield name, owner, weight.detach()


def matrices(kind: str, owner: nn.Module, name: str, weight: Tensor) -> Iterator[Tensor]:
    """The matrices `(out, in)` in a weight of a model type: one, or one behind the other."""
    from transformers.pytorch_utils import Conv1D

    from eval.tiny import TRANSPOSED

    first = isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False)
    first = first or name.rpartition(".")[2] in TRANSPOSED.get(kind, ())
    for matrix in weight.flatten(0, -3) if weight.dim() > 2 else [weight]:
        yield matrix.T if first else matrix


def holds(matrix: Tensor) -> bool:
    """Whether of every four consecutive inputs of a matrix `(out, in)` exactly two are zero."""
    if matrix.shape[1] % 4:
        return False
    return bool(((matrix.reshape(len(matrix), -1, 4) == 0).sum(-1) == 2).all())


def at_default_sizes(name: str, class_name: str, held: dict[str, tuple[int, int]]) -> float | None:
    """The coverage of a model with the default config: that of every kind of weight, with the sizes it has there.

    Args:
        name: the type.
        class_name: of the model.
        held: what of every weight of the tiny model holds the pattern.

    Returns:
        None where there is no such model, or it has other kinds of weights.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    kinds: dict[str, list[int]] = {}
    for weight, counts in held.items():
        total = kinds.setdefault(_numberless(weight), [0, 0])
        total[:] = [a + b for a, b in zip(total, counts, strict=True)]
    try:
        with torch.device("meta"):
            model = getattr(transformers, class_name)._from_config(AutoConfig.for_model(name))
        sizes = [(_numberless(weight), value.numel()) for weight, _, value in block_weights(model)]
        covered = sum(size * kinds[kind][0] / kinds[kind][1] for kind, size in sizes)
    except Exception:
        return None
    return covered / sum(size for _, size in sizes)


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def serve(name: str, loader: str, memory: int, answer: Connection) -> None:
    """What a process does."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silence_libraries(debug=False)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with tempfile.TemporaryDirectory() as folder:
        answer.send(run_type(name, loader, Path(folder)))


def run_limited(name: str, loader: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a type in a process of its own; its row."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.tiny", "llmprune.run"])
    begun = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(name, loader, options.memory, sender), daemon=True)
    process.start()
    sender.close()
    with _ended(process):
        try:
            if receiver.poll(options.seconds):
                found = receiver.recv()
            else:
                found = {"outcome": STOPPED, "reason": f"it took more than {options.seconds} s"}
        except EOFError:
            process.join()
            found = {"outcome": STOPPED, "reason": f"its process ended with {process.exitcode}"}
    versions = {"transformers": metadata.version("transformers")}
    return {"type": name, "loader": loader, **found, **versions, "seconds": round(time.monotonic() - begun, 1)}


@contextmanager
def _ended(process: Any) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.join()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for every pruned type, then one for every other, and how many there are."""
    rows = sorted(rows, key=lambda row: (row["type"], row["loader"]))
    pruned = [row for row in rows if row["outcome"] == PRUNED]
    others = [row for row in rows if row["outcome"] != PRUNED]
    full = sum(_coverage(row) >= FULL for row in pruned)
    lines = [
        f"Of {len(rows)} rows {len(pruned)} are pruned, {full} of them with at least {FULL:.0%} of the weights in "
        f"their blocks; {len(others)} are refused, or transformers cannot build them.",
        "",
        "| type | loaded as | coverage | at default sizes | stays dense |",
        "|---|---|--:|--:|---|",
    ]
    for row in pruned:
        real = row["at_default_sizes"]
        known = "" if real is None else _percent(real)
        dense = ", ".join(f"{reason} {weights / row['weights']:.1%}" for reason, weights in row["dense"].items())
        lines.append(f"| {row['type']} | {KINDS[row['loader']]} | {_percent(_coverage(row))} | {known} | {dense} |")
    lines += ["", "| type | loaded as | outcome | because |", "|---|---|---|---|"]
    for row in others:
        because = row["reason"].rstrip(":").replace("|", "\\|")
        lines.append(f"| {row['type']} | {KINDS[row['loader']]} | {row['outcome']} | {because} |")
    versions, commits = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("transformers", "commit"))
    return "\n".join([*lines, "", f"transformers {versions}; commit {commits}."])


FULL = 0.99


def _coverage(row: dict[str, Any]) -> float:
    return float(row["covered"] / row["weights"])


def _percent(share: float) -> str:
    """Rounded down, so that 100 % is all."""
    return f"{math.floor(share * 1000) / 10:.1f} %"


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.families", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all)")
    parser.add_argument("--seconds", type=positive, default=180, metavar="N", help="of a type at most (default: 180)")
    parser.add_argument("--memory", type=size, default="6GiB", help="of a process at most (default: 6GiB)")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="JSON lines (default: eval/results)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run what is missing; the exit code is 1 if a row is a fault."""
    silence_libraries(options.debug)
    done = {(row["type"], row["loader"]) for row in record.rows(options.out)}
    left = [case for case in types() if case not in done and (not options.types or case[0] in options.types)]
    stamp = record.stamp(["python", "-m", "eval.families", *given], options.out) if left else None
    faults = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda case: run_limited(*case, options), left):
            assert stamp is not None
            record.append(options.out, stamp, row)
            faults += row["outcome"] in {FAILED, WRONG, STOPPED}
            say(json.dumps({key: row.get(key) for key in ("type", "loader", "outcome", "reason")}), sys.stderr)
    return int(faults > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
