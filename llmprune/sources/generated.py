"""Self-generated calibration data: windows sampled from the dense model (self-calibration).

A short calibration text covers a narrow part of a model's distribution, and layers fitted to it one after another
overfit it; samples of the model cover what *it* expects of text. The dense outputs that layers are fitted to are as
well defined on them as on any text.

Source: self-calibration (Williams, Chrysostomou and Aletras 2025). Differs from it: there samples replace the
calibration text and start from an empty prompt; here they are added to it, prompted with pieces of it, so that its
topics are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.errors import InputError, PruneError, first_line
from llmprune.model.skeleton import Skeleton
from llmprune.progress import Progress
from llmprune.runtime.oom import out_of_memory, with_oom_retry
from llmprune.sources.tokens import TokenBatch, token_batch

if TYPE_CHECKING:
    from transformers import GenerationConfig

PROMPT_TOKENS = 16
MAX_BATCH_SIZE = 32
MEMORY_RATIO = 0.5
DO_WITHOUT = "do without self-generated calibration text (--self-calibration 0)"
LIMIT = Path("/sys/fs/cgroup/memory.max")


def sample_prompts(tokens: Tensor, windows: int, seed: int = 0, bos_tokens: int = 0) -> Tensor:
    """Prompts for generation: `PROMPT_TOKENS` tokens from random places of a text, for each window.

    Args:
        tokens: calibration windows `(samples, length)`, int64.
        windows: number of prompts.
        seed: of the places.
        bos_tokens: tokens that every calibration window begins with before its text; every prompt begins with them too.

    Returns:
        `(windows, bos_tokens + prompt)`, int64.
    """
    begin, text = tokens[0, :bos_tokens], tokens[:, bos_tokens:]
    length = text.shape[1]
    prompt = min(PROMPT_TOKENS, max(length // 2, 1))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(length - prompt + 1, (windows,), generator=generator).tolist()
    places = [text[at % len(text), start : start + prompt] for at, start in enumerate(starts)]
    return torch.stack([torch.cat([begin, place]) for place in places])


@torch.no_grad()
def generate(
    skeleton: Skeleton,
    prompts: Tensor,
    length: int,
    seed: int = 0,
    batch_size: int = MAX_BATCH_SIZE,
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample continuations of prompts from the model, up to windows of `length` tokens.

    Plain ancestral sampling (temperature 1, no top-k, no top-p) but for end-of-text tokens: no window ends early.

    Args:
        skeleton: the model; all of it that text passes through is in memory meanwhile.
        prompts: `(windows, prompt)`, int64.
        length: of the windows, in tokens.
        seed: of the draws.
        batch_size: windows generated at once; the draws depend on it.
        step: called with the number of windows that were generated.

    Returns:
        `(windows, length)`, int64.

    Raises:
        PruneError: the model's code for generation fails.
    """
    more = length - prompts.shape[1]
    if not more:
        return prompts
    settings = _settings(more)
    written = []
    devices = [skeleton.device] if skeleton.device.type == "cuda" else []
    with skeleton.loaded(skeleton.text_parameters(), whole=True), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            given = prompts[start : start + batch_size].to(skeleton.device)
            written.append(_more(skeleton, given, settings).cpu())
            if step is not None:
                step(len(given))
    return torch.cat(written)


def generated_batch(
    skeleton: Skeleton, text: TokenBatch, windows: int, drawn: tuple[int, str], progress: Progress
) -> TokenBatch:
    """Windows that a model generates, as long as those of a text and prompted with pieces of it.

    Args:
        skeleton: the model.
        text: the windows of the text.
        windows: number of windows to generate.
        drawn: the seed of the draws, and what the model is called in their provenance.
        progress: told of every window.

    Raises:
        InputError: the model cannot generate, or does not fit into the memory as a whole.
    """
    (seed, name), length = drawn, text.tokens.shape[1]

    def attempt(at_once: int) -> Tensor:
        progress.start("generating text", windows)
        prompts = sample_prompts(text.tokens, windows, seed, text.bos_tokens)
        tokens = generate(skeleton, prompts, length, seed, at_once, progress.step)
        progress.finish()
        return tokens

    at_once = min(generation_batch_size(skeleton, length), windows)
    return token_batch(with_oom_retry(attempt, at_once, progress), name, seed, text.bos_tokens)


def _more(skeleton: Skeleton, given: Tensor, settings: GenerationConfig) -> Tensor:
    try:
        found = skeleton.model.generate(
            given, attention_mask=torch.ones_like(given), generation_config=settings, trust_remote_code=False
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise PruneError(
            f"{type(skeleton.model).__name__} fails to generate text: {first_line(error)}", DO_WITHOUT
        ) from error
    assert isinstance(found, Tensor)
    return found


def _settings(more: int) -> GenerationConfig:
    """Settings of plain ancestral sampling of `more` tokens, whatever the model's defaults are."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=more,
        min_new_tokens=more,
        pad_token_id=0,
        return_dict_in_generate=False,
        output_attentions=False,
        output_hidden_states=False,
    )


def generation_batch_size(skeleton: Skeleton, length: int) -> int:
    """The largest number of windows of `length` tokens that can be generated at once in `MEMORY_RATIO` of the memory.

    Raises:
        InputError: the model cannot generate, or does not fit into that memory as a whole.
    """
    if not skeleton.model.can_generate():
        raise InputError(f"{type(skeleton.model).__name__} cannot generate text", DO_WITHOUT)
    weights, available = model_bytes(skeleton), device_memory(skeleton.device)
    window = max(window_bytes(skeleton, length), 1)
    if weights + window > MEMORY_RATIO * available:
        raise InputError(
            f"to generate text the whole model is in memory: {(weights + window) / 2**30:.1f} GiB, but "
            f"{MEMORY_RATIO:.0%} of the {available / 2**30:.1f} GiB here are all that it may take",
            DO_WITHOUT,
        )
    return int(min(MAX_BATCH_SIZE, (MEMORY_RATIO * available - weights) // window))


def window_bytes(skeleton: Skeleton, length: int) -> int:
    """Bytes of the key-value cache of a window of `length` tokens, and of the logits of its next token."""
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or skeleton.width // max(heads, 1)
    width = (getattr(config, "num_key_value_heads", None) or heads) * size
    # The cache is copied while it grows, a block at a time.
    cache = 2 * length * width * (len(skeleton.blocks) + 1) * skeleton.compute.itemsize
    return int(cache + 4 * 4 * config.vocab_size)


def model_bytes(skeleton: Skeleton) -> int:
    """Bytes of all parameters that text passes through, in the dtype they are computed in."""
    checkpoint = skeleton.checkpoint
    entries = (checkpoint.folder.entries[name] for name in checkpoint.disk_names(skeleton.text_parameters()))
    return sum(math.prod(entry.shape) for entry in entries) * skeleton.compute.itemsize


def device_memory(device: torch.device) -> int:
    """Memory of a device in bytes; of the CPU, what this process may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        available = min(available, int(LIMIT.read_text()))
    return available
