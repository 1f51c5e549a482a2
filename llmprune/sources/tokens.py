"""Windows of token ids with their provenance, from a text or from a saved token file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.files import replacing
from llmprune.runtime.foreign import open_regular, parse_json, reading
from llmprune.runtime.redact import base_name, without_paths
from llmprune.sources.texts import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METADATA = "llmprune_tokens"
OVERLAP_RUN = 32


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a batch of tokens; with the same tokenizer, the same fields give the same tokens.

    Args:
        source: base name of a file or folder, or a data set.
        samples: number of windows.
        seq_len: tokens per window.
        seed: of the random choice of windows; None where the first ones are taken.
        sha256: hash of the token ids (int64, little endian, row by row).
    """

    source: str
    samples: int
    seq_len: int
    seed: int | None
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Windows of token ids `(samples, seq_len)`, int64, and their provenance."""

    tokens: Tensor
    provenance: Provenance


def token_batch(tokens: Tensor, source: str, seed: int | None) -> TokenBatch:
    """Windows `(samples, seq_len)` with their provenance, hash included."""
    tokens = tokens.to(torch.int64).contiguous()
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return TokenBatch(tokens, Provenance(source, len(tokens), tokens.shape[1], seed, digest))


def calibration_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    cache: Path,
    progress: Progress,
) -> TokenBatch:
    """`samples` different windows of `seq_len` tokens, drawn at random from a text.

    Raises:
        InputError: no such text, or too little of it.
    """
    text = read_text(source, "calibration", samples * seq_len, seed, cache, progress)
    windows = _windows(text, tokenizer, seq_len)
    if len(windows) < samples:
        raise InputError(
            f"{source} gives {len(windows)} windows of {seq_len} tokens, but {samples} were asked for (--samples)",
            "use a longer text, fewer --samples or a smaller --seq-len",
        )
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return token_batch(windows[chosen], base_name(source), seed)


def evaluation_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    context: int,
    cache: Path,
    progress: Progress,
) -> TokenBatch:
    """The first `windows` non-overlapping windows of a text tokenised as a whole (as SparseGPT and Wanda do).

    Raises:
        InputError: no such text, or not even one window of it.
    """
    text = read_text(source, "evaluation", windows * context, 0, cache, progress)
    found = _windows(text, tokenizer, context)
    if not len(found):
        raise InputError(
            f"{source} is shorter than one window of {context} tokens", "use a longer text or a smaller --eval-context"
        )
    if len(found) < windows:
        progress.note(f"{source} has only {len(found)} windows of {context} tokens to evaluate on")
    return token_batch(found[:windows], base_name(source), None)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


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
    """The windows of a token file, or the first `samples` of them, cut to `seq_len` tokens.

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
    if wanted[0] > len(tokens) or wanted[1] > tokens.shape[1]:
        raise InputError(
            f"{path} holds {tuple(tokens.shape)} tokens, but {wanted} were asked for (--samples, --seq-len)",
            "leave out --samples and --seq-len to use the whole file",
        )
    # A recipe's source is a text, any other the name of a file, a folder or a data set.
    made_of = without_paths(kept.source) if " " in kept.source else base_name(kept.source)
    return token_batch(tokens[: wanted[0], : wanted[1]], f"{path.name} ({made_of})", kept.seed)


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
