"""From documents to windows: packed or sampled, mixed by weight, none of them in the evaluation texts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib.documents import documents
from calib.recipe import Part, Recipe
from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.sources.bos import window_beginning
from llmprune.sources.texts import Reader, text_pieces
from llmprune.sources.tokenize import text_ids
from llmprune.sources.tokens import OVERLAP_RUN, TokenBatch, begun, run_hashes, token_batch

AVOIDED_TOKENS = 400_000


def build(recipe: Recipe, tokenizer: Any, cache: Path, progress: Progress) -> TokenBatch:
    """The windows of a recipe, in random order.

    Args:
        recipe: what to make.
        tokenizer: of the model that will be pruned.
        cache: folder of the demo data.
        progress: told about every window.

    Raises:
        InputError: a source that cannot be read, or is too small.
    """
    reader = Reader(tokenizer, cache, progress, recipe.bos)
    begin = window_beginning(tokenizer, recipe.bos)
    if recipe.seq_len <= len(begin):
        raise InputError(f"a window of {recipe.seq_len} tokens holds no text behind BOS", "use a larger seq_len")
    known = KnownRuns([_ids(text, reader) for text in recipe.avoid])
    chosen: list[list[int]] = []
    names = []
    progress.start("windows", recipe.samples)
    for part, count in zip(recipe.parts, shares([part.weight for part in recipe.parts], recipe.samples), strict=True):
        chosen += _windows_of(part, count, replace(recipe, seq_len=recipe.seq_len - len(begin)), reader, known)
        names.append(f"{count} of {part.name}")
    progress.finish()
    if known.refused:
        progress.note(f"{known.refused} windows share {OVERLAP_RUN} tokens in a row with {', '.join(recipe.avoid)}")
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(recipe.seed))
    windows = begun(torch.tensor(chosen)[order], begin)
    return token_batch(windows, f"{recipe.name}: {', '.join(names)}", recipe.seed, len(begin))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainders; ties: first come)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in largest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _windows_of(part: Part, count: int, recipe: Recipe, reader: Reader, known: KnownRuns) -> list[list[int]]:
    """So many windows of `recipe.seq_len` tokens of text."""
    ids = documents(part, reader.tokenizer, recipe.seed, reader.progress)
    if recipe.windows == "packed":
        found = packed(ids, recipe.seq_len, None if part.messages else reader.tokenizer.eos_token_id)
    else:
        found = sampled(ids, recipe.seq_len, recipe.seed)
    fit = (window for window in found if not known.hold(window))
    if part.path or part.join:
        pool = list(fit)
        random.Random(recipe.seed).shuffle(pool)  # noqa: S311
        fit = iter(pool)
    taken = []
    for window in islice(fit, count):
        taken.append(window)
        reader.progress.step()
    if len(taken) < count:
        lost = f" ({known.refused} share text with {', '.join(recipe.avoid)})" if known.refused else ""
        raise InputError(
            f"{part.name} gives {len(taken)} windows of {recipe.seq_len} tokens{lost}, but the recipe asks for {count}",
            "lower samples, seq_len or the source's weight, or add text",
        )
    return taken


def packed(ids: Iterable[list[int]], length: int, end: int | None) -> Iterator[list[int]]:
    """Documents laid end to end and cut; `end` is put behind each (None: nothing); the last, short piece is dropped."""
    rest: list[int] = []
    for document in ids:
        rest += document if end is None else [*document, end]
        full = len(rest) // length * length
        yield from (rest[start : start + length] for start in range(0, full, length))
        rest = rest[full:]


def sampled(ids: Iterable[list[int]], length: int, seed: int) -> Iterator[list[int]]:
    """One window at a random place of every document of at least `length` tokens."""
    generator = random.Random(seed)  # noqa: S311
    for document in ids:
        if len(document) >= length:
            start = generator.randrange(len(document) - length + 1)
            yield document[start : start + length]


class KnownRuns:
    """The runs of `OVERLAP_RUN` tokens of some texts.

    Args:
        texts: token ids of each.
    """

    def __init__(self, texts: list[list[int]]) -> None:
        hashes = [_hashes(torch.tensor([ids])) for ids in texts]
        self._runs = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)
        self.refused = 0

    def hold(self, window: list[int]) -> bool:
        """Whether a run of the window is one of them."""
        hashes = _hashes(torch.tensor([window]))
        if not self._runs.size or not hashes.size:
            return False
        place = np.minimum(np.searchsorted(self._runs, hashes), self._runs.size - 1)
        found = bool((self._runs[place] == hashes).any())
        self.refused += found
        return found


def _hashes(tokens: Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return run_hashes(tokens, OVERLAP_RUN)


def _ids(source: str, reader: Reader) -> list[int]:
    return text_ids(text_pieces(source, "evaluation", reader, AVOIDED_TOKENS, 0), reader.tokenizer)
