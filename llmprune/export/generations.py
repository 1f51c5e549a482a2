"""Greedy continuations of the same texts by the dense and the pruned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune.errors import InputError
from llmprune.export.pack import load
from llmprune.progress import Progress
from llmprune.reporting.report import Generation, PruneReport
from llmprune.runtime.device import pick_device
from llmprune.runtime.foreign import reading
from llmprune.sources.demo import default_cache
from llmprune.sources.models import load_tokenizer, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils when",
)


def add_generations(
    report: PruneReport,
    folder: Path,
    tokens: int,
    prompts: Sequence[str] = PROMPTS,
    dense: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Add greedy continuations of texts to a report.

    The models are loaded whole, one after the other: this is the only step that needs a whole model in memory, and
    therefore no part of a run.

    Args:
        report: of the run that wrote `folder`.
        folder: plain or packed.
        tokens: number of new tokens.
        prompts: the texts.
        dense: the dense model; None for that of the report.
        progress: notified of the steps.

    Raises:
        InputError: a model cannot be found.
    """
    progress = progress or Progress()
    source = open_source(
        dense or dense_of(report),
        revision=None if dense else report.model["revision"] or None,
        cache=default_cache(),
        trust_remote_code=False,
        progress=progress,
    )
    tokenizer = load_tokenizer(source, trust_remote_code=False)
    progress.start("generating", 2 * len(prompts))
    texts = [continuations(place, tokenizer, prompts, tokens, progress) for place in (source.folder, folder)]
    progress.finish()
    report.generations = [Generation(*three) for three in zip(prompts, *texts, strict=True)]


def dense_of(report: PruneReport, flag: str = "--dense") -> str:
    """The dense model that a report names; of a local one it knows the base name only.

    Args:
        report: of a pruned folder.
        flag: that names the model instead.

    Raises:
        InputError: no such model is to be found here.
    """
    name = str(report.model["name"])
    if report.model["revision"] or name == "demo" or Path(name).exists():
        return name
    raise InputError(f"the dense model {name!r} is not here; the report does not say where it lay", f"add {flag} MODEL")


@torch.no_grad()
def continuations(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int, progress: Progress
) -> list[str]:
    """The greedy continuation of each text by the model in `folder`, `tokens` tokens or up to its end."""
    device = pick_device("auto")
    model = load(folder).to(device)
    written = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        start = inputs["input_ids"].shape[1]
        with reading(f"the model in {folder} cannot generate text", "check its generation_config.json"):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
                trust_remote_code=False,  # some ways to generate are code from the Hub
            )
        written.append(tokenizer.decode(output[0, start:], skip_special_tokens=True))
        progress.step()
    return written
