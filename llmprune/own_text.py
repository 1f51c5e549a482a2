"""Calibration text that the dense model writes itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.skeleton import Skeleton

PROMPT = 16
AT_ONCE = 32
MOST_OF_MEMORY = 0.5


def write_text(
    skeleton: Skeleton,
    text: Tensor,
    windows: int,
    seed: int = 0,
    at_once: int = AT_ONCE,
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """Windows that the model writes, every one going on from a few tokens of the calibration text.

    A short text of one kind holds a narrow part of what a model knows, and layers that are fitted to it one after
    another learn its peculiarities; what the model writes shows the layers what *it* expects of text. Its answer to
    that, which they are fitted to, is known like that to any other text.

    Source: self-calibration (Williams, Chrysostomou and Aletras 2025), where the model's text stands in for all other
    text and begins with nothing; here both are used, and the text's topics are kept.

    Args:
        skeleton: the model; all of it is in memory meanwhile.
        text: calibration windows `(samples, length)`, int64.
        windows: how many to write.
        seed: of the places to go on from, and of the draws.
        at_once: how many windows are written together; others are drawn if it changes.
        step: told how many windows are done.

    Returns:
        `(windows, length)`, int64.
    """
    length = text.shape[1]
    generator = torch.Generator().manual_seed(seed)
    prompt = min(PROMPT, max(length // 2, 1))
    starts = torch.randint(length - prompt + 1, (windows,), generator=generator).tolist()
    prompts = torch.stack([text[at % len(text), start : start + prompt] for at, start in enumerate(starts)])
    return go_on(skeleton, prompts, length, seed, at_once, step)


@torch.no_grad()
def go_on(
    skeleton: Skeleton,
    prompts: Tensor,
    length: int,
    seed: int = 0,
    at_once: int = AT_ONCE,
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """Let the model go on from each of the prompts `(windows, tokens)` to a length in tokens.

    Tokens are drawn from the model's own distribution as it is (temperature 1, nothing cut off); no window ends early.
    """
    from transformers import GenerationConfig

    more = length - prompts.shape[1]
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=more, min_new_tokens=more, pad_token_id=0
    )
    written = []
    devices = [skeleton.device] if skeleton.device.type == "cuda" else []
    with skeleton.loaded(list(skeleton.checkpoint)), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), at_once):
            given = prompts[start : start + at_once].to(skeleton.device)
            mask = torch.ones_like(given)
            written.append(skeleton.model.generate(given, attention_mask=mask, generation_config=settings).cpu())
            if step is not None:
                step(len(given))
    return torch.cat(written)


def check_room(skeleton: Skeleton) -> None:
    """Refuse a model that cannot write here.

    Raises:
        InputError: it has no way to, or does not fit into memory as a whole.
    """
    if not skeleton.model.can_generate():
        raise InputError(f"{type(skeleton.model).__name__} cannot write text", "leave it out: --own 0")
    needed, there = whole_bytes(skeleton), memory_of(skeleton.device)
    if needed > MOST_OF_MEMORY * there:
        raise InputError(
            f"to write text the whole model is in memory: {needed / 2**30:.1f} GiB, but {MOST_OF_MEMORY:.0%} of the "
            f"{there / 2**30:.1f} GiB here are all that it may take",
            "leave it out (--own 0)",
        )


def whole_bytes(skeleton: Skeleton) -> int:
    """Of all parameters, as they are computed with."""
    entries = skeleton.checkpoint.folder.entries.values()
    return sum(math.prod(entry.shape) for entry in entries) * skeleton.compute.itemsize


def memory_of(device: torch.device) -> int:
    """All memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
