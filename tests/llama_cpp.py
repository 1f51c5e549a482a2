"""llama.cpp in this process, and small tokenizers that it has, too. Who imports this is skipped where it is missing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

xllamacpp = pytest.importorskip("xllamacpp")

TOKENS = 300
"""Of the small tokenizers; <s> and </s> come first."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LlamaCpp:
    """A model that llama.cpp has read from a GGUF file; it keeps keys and values in float32.

    Args:
        path: of the file.
        context: the longest text.
    """

    def __init__(self, path: Path, context: int = 256) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), context, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.warmup, settings.verbosity = False, -1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def greedy(
        self, prompt: str | list[int], count: int, forbidden: Sequence[int] = (), forced: int | None = None
    ) -> tuple[list[int], list[dict[int, float]], int]:
        """Greedy tokens, some log-probabilities before each of them, and the length of the prompt.

        Args:
            prompt: a text, which llama.cpp splits, or tokens.
            count: number of tokens to generate.
            forbidden: tokens that are not.
            forced: the only token that is.
        """
        bias: list[list[Any]] = [[token, False] for token in forbidden]
        bias += [[forced, 1000.0]] if forced is not None else []
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": 5, "logit_bias": bias}
        answer = self.server.handle_completions({**asked, "cache_prompt": False, "stream": False})
        found = answer["choices"][0]["logprobs"]["content"]
        told = [
            {each["id"]: each["logprob"]} | {other["id"]: other["logprob"] for other in each["top_logprobs"]}
            for each in found
        ]
        return [each["id"] for each in found], told, answer["usage"]["prompt_tokens"]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompt: list[int], found: list[int], forbidden: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """The greedy tokens of transformers behind a prompt and each of the tokens that were found, and log-probabilities.

    Where they are the tokens found, both have written the same text.
    """
    logits = model(input_ids=torch.tensor([prompt + found]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    allowed = logits.clone()
    allowed[:, list(forbidden)] = -torch.inf
    return allowed.argmax(-1).tolist(), logits.log_softmax(-1)


@cache
def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer all of whose tokens are text; not to be changed."""
    return byte_level(every_byte=False)


@cache
def words(count: int = 3000) -> list[str]:
    """Lines of random words."""
    draw = random.Random(0)
    each = ["".join(draw.choices(LETTERS, k=draw.randint(1, 6))) for _ in range(count)]
    return [" ".join(each[at : at + 12]) for at in range(0, count, 12)]


def byte_level(
    splits: Sequence[Any] = (), whole: bool = False, every_byte: bool = True, size: int = TOKENS, **options: Any
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer.

    Args:
        splits: steps before the bytes; none for GPT-2's own.
        whole: whether a word that is a token is never split.
        every_byte: whether each byte is a token; if not, all tokens are letters of ASCII, so that any of them is text.
        size: number of tokens.
        options: of the tokenizer of transformers.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    own = not any(isinstance(step, pre_tokenizers.Split) for step in splits)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokenizer.train_from_iterator(
        words(),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def sentencepiece(prefix: bool = True, metaspace: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes it of SentencePiece's BPE, with a token for every byte.

    Args:
        prefix: whether a space is put before a text, by the normalizer.
        metaspace: where a pre-tokenizer puts one instead.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(words(), trainers.BpeTrainer(vocab_size=TOKENS, show_progress=False))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Pieces by length, as their scores are; whatever two pieces make one may be joined.
    pieces = sorted(trained.get_vocab(), key=lambda text: (len(text), text))
    vocabulary = {text: number for number, text in enumerate([*special, *pieces])}
    merges = [
        (text[:at], text[at:])
        for text in pieces
        for at in range(1, len(text))
        if text[:at] in vocabulary and text[at:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix and not metaspace else []
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
