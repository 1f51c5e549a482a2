"""Windows of token ids with their provenance, from a text or from a saved token file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import InputError
from llmprune.runtime.files import replacing
from llmprune.runtime.foreign import open_regular, parse_json, reading
from llmprune.runtime.redact import base_name, without_paths
from llmprune.sources.bos import window_beginning
from llmprune.sources.texts import Reader, text_pieces
from llmprune.sources.tokenize import separable, token_ids

METADATA = "llmprune_tokens"
OVERLAP_RUN = 32
DRAWN_CHARACTERS = 2**22
"""Calibration windows are drawn from so much of a text, or from as much as holds them."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a batch of tokens; with the same tokenizer, the same fields give the same tokens.

    Args:
        source: base name of a file or folder, or a data set.
        samples: number of windows.
        seq_len: tokens per window.
        seed: of the random choice of windows; None where the first ones are taken.
        sha256: hash of the token ids (int64, little endian, row by row).
        bos_tokens: tokens that every window begins with before its text: 1 for BOS, 0 for none.
        characters: of a longer text that windows are drawn from; None for all of it.
    """

    source: str
    samples: int
    seq_len: int
    seed: int | None
    sha256: str
    bos_tokens: int = 0
    characters: int | None = None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Windows of token ids `(samples, seq_len)`, int64, and their provenance."""

    tokens: Tensor
    provenance: Provenance

    @property
    def bos_tokens(self) -> int:
        """Tokens that every window begins with before its text."""
        return self.provenance.bos_tokens

    @property
    def text(self) -> Tensor:
        """The windows without them, `(samples, seq_len - bos_tokens)`."""
        return self.tokens[:, self.bos_tokens :]


def token_batch(
    tokens: Tensor, source: str, seed: int | None, bos_tokens: int = 0, characters: int | None = None
) -> TokenBatch:
    """Windows `(samples, seq_len)` with their provenance, hash included."""
    tokens = tokens.to(torch.int64).contiguous()
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return TokenBatch(tokens, Provenance(source, len(tokens), tokens.shape[1], seed, digest, bos_tokens, characters))


def calibration_tokens(
    source: str, reader: Reader, *, samples: int, seq_len: int, seed: int, flag: str = "--samples"
) -> TokenBatch:
    """Different windows of `seq_len` tokens, drawn at random from a text (of a long one, from its first part).

    Args:
        source: see `text_pieces`.
        reader: tokenizer, and how windows begin.
        samples, seq_len: number of windows, and tokens in each.
        seed: of the draw.
        flag: that asked for the number of windows.

    Raises:
        InputError: no such text, or too little of it.
    """
    text = text_pieces(source, "calibration", reader, samples * seq_len, seed)
    found = _windows(text, reader, seq_len, samples, DRAWN_CHARACTERS)
    if len(found.tokens) < samples:
        raise InputError(
            f"{source} gives {len(found.tokens)} windows of {seq_len} tokens, but {samples} were asked for ({flag})",
            f"use a longer text, fewer {flag} or a smaller --seq-len",
        )
    chosen = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(seed))[:samples]
    return token_batch(found.tokens[chosen], base_name(source), seed, found.bos_tokens, found.characters)


def evaluation_tokens(source: str, reader: Reader, *, windows: int, context: int) -> TokenBatch:
    """The first `windows` non-overlapping windows of a text tokenised as a whole (as SparseGPT and Wanda do).

    Args:
        source: see `text_pieces`.
        reader: tokenizer, and how windows begin.
        windows, context: number of windows, and tokens in each.

    Raises:
        InputError: no such text, or not even one window of it.
    """
    text = text_pieces(source, "evaluation", reader, windows * context, seed=0)
    found = _windows(text, reader, context, windows, 0)
    if not len(found.tokens):
        raise InputError(
            f"{source} is shorter than one window of {context} tokens", "use a longer text or a smaller --eval-context"
        )
    if len(found.tokens) < windows:
        reader.progress.note(f"{source} has only {len(found.tokens)} windows of {context} tokens to evaluate on")
    return token_batch(found.tokens[:windows], base_name(source), None, found.bos_tokens)


class _Windows(NamedTuple):
    """Consecutive windows of a text `(windows, length)`; how they begin; characters that were read, None for all."""

    tokens: Tensor
    bos_tokens: int
    characters: int | None


def _windows(text: Iterable[str], reader: Reader, length: int, least: int, characters: int) -> _Windows:
    """Windows of a text, as many as there are in the characters that are read.

    Args:
        text: in parts of any size.
        reader: tokenizer, and how windows begin.
        length: of a window, its beginning included.
        least: number of windows for which the text is read on, if it has them.
        characters: that are read in any case, about.

    Raises:
        InputError: a window holds no text.
    """
    begin = window_beginning(reader.tokenizer, reader.bos)
    inner = length - len(begin)
    if inner < 1:
        raise InputError(f"a window of {length} tokens holds no text behind BOS", "use longer windows")
    found = [torch.empty(0, dtype=torch.int64)]
    count = read = 0
    part = None
    for piece in separable(text, reader.tokenizer):
        if count >= least * inner and read >= characters:
            part = read
            break
        found.append(torch.tensor(token_ids(piece, reader.tokenizer), dtype=torch.int64))
        count, read = count + len(found[-1]), read + len(piece)
    ids = torch.cat(found)[: count // inner * inner].view(count // inner, inner)
    return _Windows(begun(ids, begin), len(begin), part)


def begun(text: Tensor, begin: Sequence[int]) -> Tensor:
    """Windows of text `(windows, length)` with the same ids put before each, `(windows, len(begin) + length)`."""
    return torch.cat([torch.tensor(begin, dtype=text.dtype).expand(len(text), -1), text], dim=1)


def save_tokens(batch: TokenBatch, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write a token file: one tensor `tokens`, its provenance, and the recipe that made it, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors writes several in any order, and the same tokens must give the same bytes.
    metadata = {METADATA: json.dumps(asdict(batch.provenance) | ({"recipe": recipe} if recipe else {}))}
    with replacing(path) as partial:
        try:
            save_file({"tokens": batch.tokens}, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tokens(path: Path, samples: int | None, seq_len: int | None, vocabulary: int) -> TokenBatch:
    """The windows of a token file as they are, or the first `samples` of them, cut to `seq_len` tokens.

    Raises:
        InputError: no token file, too few or too short windows, ids beyond the vocabulary.
    """
    with reading(f"{path} is no token file", "make one with `python -m calib`"):
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {})[METADATA])
            tokens = file.get_tensor("tokens").clone()
        metadata.pop("recipe", None)
        kept = Provenance(**metadata)
        if not isinstance(kept.source, str) or not isinstance(kept.seed, int | None):
            raise ValueError(f"its source is {kept.source!r}, its seed {kept.seed!r}")
        if type(kept.bos_tokens) is not int or not isinstance(kept.characters, int | None):
            raise ValueError(f"its BOS tokens are {kept.bos_tokens!r}, its characters {kept.characters!r}")
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
        raise InputError(
            f"{path} holds {tokens.dtype} of shape {tuple(tokens.shape)}, not int64 (samples, seq_len)", "make it again"
        )
    if token_batch(tokens, "", None).provenance.sha256 != kept.sha256:
        raise InputError(
            f"the tokens in {path} do not have the hash that it states", "the file is damaged; make it again"
        )
    if (largest := int(tokens.max())) >= vocabulary or int(tokens.min()) < 0:
        raise InputError(
            f"{path} has token id {largest}, the model's vocabulary ends at {vocabulary - 1}",
            "make the token file with this model's tokenizer",
        )
    wanted = (samples or len(tokens), seq_len or tokens.shape[1])
    if not 0 <= kept.bos_tokens < wanted[1]:
        raise InputError(
            f"of {wanted[1]} tokens in each window of {path}, {kept.bos_tokens} are BOS",
            "use longer windows (--seq-len)",
        )
    if wanted[0] > len(tokens) or wanted[1] > tokens.shape[1]:
        raise InputError(
            f"{path} holds {tuple(tokens.shape)} tokens, but {wanted} were asked for (--samples, --seq-len)",
            "leave out --samples and --seq-len to use the whole file",
        )
    # A recipe's source is a text, any other the name of a file, a folder or a data set.
    made_of = without_paths(kept.source) if " " in kept.source else base_name(kept.source)
    source = f"{path.name} ({made_of})"
    return token_batch(tokens[: wanted[0], : wanted[1]], source, kept.seed, kept.bos_tokens, kept.characters)


def shared_runs(a: Tensor, b: Tensor, length: int = OVERLAP_RUN) -> float:
    """Ratio of the n-grams of `length` tokens in the windows `b` that also occur in the windows `a`."""
    hashes_a, hashes_b = run_hashes(a, length), run_hashes(b, length)
    return float(np.isin(hashes_b, hashes_a).mean()) if hashes_b.size else 0.0


def run_hashes(tokens: Tensor, length: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Polynomial hashes, modulo 2^64, of all n-grams of `length` tokens inside the windows."""
    ids = tokens.numpy().astype(np.uint64) + np.uint64(1)
    count = max(ids.shape[1] - length + 1, 0)
    total = np.zeros((ids.shape[0], count), dtype=np.uint64)
    for offset in range(length if count else 0):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + count]
    return total.ravel()
