"""`python -m eval.perplexity MODEL --text SRC [SRC ...]`: measure a model on texts, one block in memory at a time.

With `--dense MODEL` also how far it is from that model: the Kullback-Leibler divergence of its next-token
distribution, and how often both would say the same next token. Every figure has a standard error, from the spread over
windows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.models import find_model
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, window
from llmprune.job import BOS
from llmprune.reporting.words import bos_text

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.model.skeleton import Skeleton
    from llmprune.streaming.stream import BlockStream

FIGURES = (("perplexity", "value"), ("dense", "dense"), ("KL, nats", "kl"), ("same top token", "top1"))


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.perplexity", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="model folder, Hub id, .gguf file, or demo")
    parser.add_argument("--text", nargs="+", required=True, metavar="SRC", help="text files, folders or data set names")
    parser.add_argument("--dense", metavar="MODEL", help="model to compare with; it must have the same tokenizer")
    parser.add_argument("--windows", type=positive, default=20, metavar="N", help="windows per text (default: 20)")
    parser.add_argument(
        "--context", type=window, nargs="+", default=[1024], metavar="N", help="tokens per window (default: 1024)"
    )
    parser.add_argument(
        "--bos", nargs="+", choices=BOS, default=[BOS[0]], help="whether windows begin with BOS (default: auto)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto (default: cpu)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def open_model(name: str, device: str = "cpu") -> tuple[Skeleton, Any]:
    """A model without its weights in memory, and its tokenizer."""
    from llmprune.model.skeleton import Skeleton
    from llmprune.runtime.device import pick_device
    from llmprune.sources.models import load_tokenizer

    source = find_model(name)
    skeleton = Skeleton(source.config, source.weights(source.dtype), device=pick_device(device))
    return skeleton, load_tokenizer(source, False)


def measure(
    model: str,
    texts: list[str],
    windows: int,
    context: int,
    dense: str | None = None,
    device: str = "cpu",
    bos: str = "auto",
) -> dict[str, dict[str, Any]]:
    """The perplexity of a model on each text, with its standard error; with a dense model also `distance` from it."""
    from llmprune.progress import Progress
    from llmprune.sources.demo import default_cache
    from llmprune.sources.texts import Reader
    from llmprune.sources.tokens import evaluation_tokens
    from llmprune.streaming.perplexity import perplexity

    skeleton, tokenizer = open_model(model, device)
    reference = open_model(dense, device)[0] if dense else None
    reader = Reader(tokenizer, default_cache(), Progress(), bos)
    result = {}
    for text in texts:
        batch = evaluation_tokens(text, reader, windows=windows, context=context)
        if reference:
            found = distance(skeleton, reference, batch.tokens, batch.bos_tokens)
        else:
            found = asdict(perplexity(skeleton, batch.tokens, bos_tokens=batch.bos_tokens))
        result[Path(text).name] = {**found, "bos_tokens": batch.bos_tokens, "sha256": batch.provenance.sha256}
    return result


def distance(model: Skeleton, dense: Skeleton, tokens: Tensor, bos_tokens: int = 0) -> dict[str, Any]:
    """Perplexities of both, the divergence `KL(dense ‖ model)` in nats per token, and the agreement of the top tokens.

    Args:
        model, dense: with the same vocabulary.
        tokens: `(windows, context)`, int64.
        bos_tokens: tokens that every window begins with before its text; they are not predicted.

    Raises:
        InputError: the vocabularies differ.
    """
    import torch

    from llmprune.errors import InputError
    from llmprune.streaming.perplexity import from_losses, window_losses

    sizes = [skeleton.config.get_text_config().vocab_size for skeleton in (model, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the model has {sizes[0]} tokens, the dense one {sizes[1]}", "--dense names the model it was pruned from"
        )
    streams = [run_through(skeleton, tokens) for skeleton in (model, dense)]
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    gaps = []
    with torch.no_grad(), model.loaded(model.outside()), dense.loaded(dense.outside()):
        for pair in zip(*(stream.inputs.batches for stream in streams), strict=True):
            for found, skeleton, stream, batch in zip(losses, (model, dense), streams, pair, strict=True):
                found.append(window_losses(skeleton, batch.tokens, batch.hidden, stream.inputs.wrap, bos_tokens))
            gaps.append(window_gaps((model, dense), streams, pair, bos_tokens))
    context = tokens.shape[1]
    mine, theirs = (from_losses(torch.cat(found), context) for found in losses)
    kl, top1 = torch.cat(gaps).unbind(1)
    return {
        **asdict(mine),
        "dense": theirs.value,
        "dense_error": theirs.error,
        "kl": float(kl.mean()),
        "kl_error": standard_error(kl),
        "top1": float(top1.mean()),
        "top1_error": standard_error(top1),
    }


def run_through(skeleton: Skeleton, tokens: Tensor) -> BlockStream:
    """The stream behind its last block."""
    import torch

    from llmprune.streaming.stream import BlockStream

    with torch.no_grad():
        stream = BlockStream(skeleton, tokens)
        for _ in stream:
            pass
    return stream


def window_gaps(
    models: tuple[Skeleton, Skeleton], streams: list[BlockStream], pair: tuple[Any, Any], bos_tokens: int
) -> Tensor:
    """Mean divergence and agreement of every window, `(batch, 2)`; logits are formed for a few positions at a time."""
    import torch

    from llmprune.streaming.capture import logits
    from llmprune.streaming.perplexity import CHUNK_ELEMENTS, first_predicted

    tokens = pair[0].tokens
    batch, context = tokens.shape
    first = first_predicted(bos_tokens) - 1
    chunk = max(1, CHUNK_ELEMENTS // (2 * batch * models[0].config.get_text_config().vocab_size))
    total = torch.zeros(batch, 2, dtype=torch.float64)
    for start in range(first, context - 1, chunk):
        part = slice(start, min(start + chunk, context - 1))
        p, q = (
            logits(skeleton, tokens[:, part], one.hidden[:, part].to(skeleton.device), stream.inputs.wrap)
            .float()
            .log_softmax(-1)
            for skeleton, stream, one in zip(models, streams, pair, strict=True)
        )
        total[:, 0] += (q.exp() * (q - p)).sum(-1).sum(1, dtype=torch.float64).cpu()
        total[:, 1] += (p.argmax(-1) == q.argmax(-1)).sum(1).cpu()
    return total / (context - 1 - first)


def standard_error(values: Tensor) -> float:
    """Of the mean; 0 for a single value."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for every context, beginning and text."""
    return [
        {"text": text, **found}
        for context in options.context
        for bos in options.bos
        for text, found in measure(
            options.model, options.text, options.windows, context, options.dense, options.device, bos
        ).items()
    ]


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    silence_libraries(options.debug)
    results = rows(options)
    if options.json:
        say(json.dumps({"model": options.model, "dense": options.dense, "results": results}, indent=2))
        return 0
    for found in results:
        errors = {"value": "error"}
        figures = [
            f"{title} {found[key]:.4g} ± {found[errors.get(key, f'{key}_error')]:.2g}"
            for title, key in FIGURES
            if key in found
        ]
        say(f"{found['text']} ({found['windows']} x {found['context']}{bos_text(found)}): {', '.join(figures)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
