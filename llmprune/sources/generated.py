"""Calibration text that the dense model writes itself.

A short text of one kind holds a narrow part of what a model knows, and layers that are fitted to it one after another
learn its peculiarities; what the model writes shows the layers what *it* expects of text. Its answer to that, which
they are fitted to, is known like that to any other text.

Source: self-calibration (Williams, Chrysostomou and Aletras 2025), where the model's text stands in for all other text
and begins with nothing; here both are used, and the model's goes on from the other's, whose topics it keeps.
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
from llmprune.runtime.oom import out_of_memory

if TYPE_CHECKING:
    from transformers import GenerationConfig

PROMPT = 16
AT_ONCE = 32
MOST_OF_MEMORY = 0.5
WITHOUT = "do without text by the model itself (--self-calibration 0)"
LIMIT = Path("/sys/fs/cgroup/memory.max")


def beginnings(text: Tensor, windows: int, seed: int = 0) -> Tensor:
    """A few tokens from anywhere in a text, for each of so many windows that a model is to write.

    Args:
        text: calibration windows `(samples, length)`, int64.
        windows: how many beginnings.
        seed: of the places.

    Returns:
        `(windows, prompt)`, int64.
    """
    length = text.shape[1]
    prompt = min(PROMPT, max(length // 2, 1))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(length - prompt + 1, (windows,), generator=generator).tolist()
    return torch.stack([text[at % len(text), start : start + prompt] for at, start in enumerate(starts)])


@torch.no_grad()
def go_on(
    skeleton: Skeleton,
    prompts: Tensor,
    length: int,
    seed: int = 0,
    at_once: int = AT_ONCE,
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """Let the model go on from prompts to windows of a length.

    Tokens are drawn from the model's own distribution as it is (temperature 1, nothing cut off) but for the tokens that
    end a text: no window ends early.

    Args:
        skeleton: the model; all of it is in memory meanwhile.
        prompts: `(windows, prompt)`, int64.
        length: of the windows, in tokens.
        seed: of the draws.
        at_once: how many windows are written together; others are drawn if it changes.
        step: told how many windows are done.

    Returns:
        `(windows, length)`, int64.

    Raises:
        PruneError: the model's own code for this fails.
    """
    more = length - prompts.shape[1]
    if not more:
        return prompts
    settings = _settings(more)
    written = []
    devices = [skeleton.device] if skeleton.device.type == "cuda" else []
    with skeleton.loaded(list(skeleton.checkpoint)), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), at_once):
            given = prompts[start : start + at_once].to(skeleton.device)
            written.append(_more(skeleton, given, settings).cpu())
            if step is not None:
                step(len(given))
    return torch.cat(written)


def _more(skeleton: Skeleton, given: Tensor, settings: GenerationConfig) -> Tensor:
    try:
        found = skeleton.model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise PruneError(
            f"{type(skeleton.model).__name__} fails to write text: {first_line(error)}", WITHOUT
        ) from error
    assert isinstance(found, Tensor)
    return found


def _settings(more: int) -> GenerationConfig:
    """Plain draws, whatever the model's own settings are."""
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


def check_room(skeleton: Skeleton, length: int) -> int:
    """How many windows of so many tokens the model can write at once.

    Raises:
        InputError: it has no way to, or does not fit into memory as a whole.
    """
    if not skeleton.model.can_generate():
        raise InputError(f"{type(skeleton.model).__name__} cannot write text", WITHOUT)
    needed, there = whole_bytes(skeleton), memory_of(skeleton.device)
    window = max(window_bytes(skeleton, length), 1)
    if needed + window > MOST_OF_MEMORY * there:
        raise InputError(
            f"to write text the whole model is in memory: {(needed + window) / 2**30:.1f} GiB, but "
            f"{MOST_OF_MEMORY:.0%} of the {there / 2**30:.1f} GiB here are all that it may take",
            WITHOUT,
        )
    return int(min(AT_ONCE, (MOST_OF_MEMORY * there - needed) // window))


def window_bytes(skeleton: Skeleton, length: int) -> int:
    """Of the keys and values of a window of so many tokens, and of what its next token is drawn from."""
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    width = (getattr(config, "num_key_value_heads", None) or heads) * size
    # They are copied while they grow, a block at a time.
    kept = 2 * length * width * (len(skeleton.blocks) + 1) * skeleton.compute.itemsize
    return int(kept + 4 * 4 * config.vocab_size)


def whole_bytes(skeleton: Skeleton) -> int:
    """Of all parameters, as they are computed with."""
    entries = skeleton.checkpoint.folder.entries.values()
    return sum(math.prod(entry.shape) for entry in entries) * skeleton.compute.itemsize


def memory_of(device: torch.device) -> int:
    """All memory of a device, in bytes; of a machine, what this process may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        there = min(there, int(LIMIT.read_text()))
    return there
