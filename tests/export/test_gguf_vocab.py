"""A tokenizer in GGUF: llama.cpp splits text as the tokenizer of transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers import tiny_model, word_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmprune.errors import InputError
from llmprune.export.gguf import export_gguf
from llmprune.export.gguf_vocab import DIGITS, GPT2, SPLITS, vocabulary
from llmprune.progress import Progress

llama_cpp = pytest.importorskip("llama_cpp", reason="xllamacpp is missing", exc_type=ImportError)

TEXTS = (
    "a text of words",
    " Don't you'Re  HERE we'LL\n\n  see 1234567 3.14\t\tthings...!?  ",
    "Zürich, naïve ŁÓDŹ CamelCaseWord x=y//2; # ok\r\n\r\nмир 東京 😀👍🏽 ½ ² ٣٤",
)
ROWS = 640


class Ears(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def same_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...] = TEXTS) -> dict[str, Any]:
    """Check that llama.cpp makes the same tokens of texts: the same number, and the same next probability behind them.

    Returns:
        The fields of the file's header.
    """
    model = tiny_model("llama", vocab_size=ROWS, max_position_embeddings=256, eos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_gguf(folder, folder / "model.gguf", kind="f32")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    there = llama_cpp.LlamaCpp(folder / "model.gguf")
    letter = tokenizer.convert_tokens_to_ids("e")
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        _, told = llama_cpp.greedy(loaded, tokens, [letter])
        _, found, length = there.greedy(text, 1, forced=letter)
        assert length == len(tokens), (text, tokenizer.convert_ids_to_tokens(tokens))
        assert found[0][letter] == pytest.approx(float(told[0, letter]), abs=1e-5), text
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}


def splits(expressions: tuple[str, ...]) -> list[Any]:
    """The steps of a pre-tokenizer before the bytes."""
    made: list[Any] = []
    for expression in expressions:
        if expression == DIGITS:
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif expression != GPT2:
            made.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    return made


@pytest.mark.parametrize("key", SPLITS, ids=SPLITS.values())
def test_every_pre_tokenizer_is_named_as_llama_cpp_has_it(tmp_path: Path, key: tuple[tuple[str, ...], bool]) -> None:
    expressions, whole = key
    header = same_tokens(tmp_path, llama_cpp.byte_level(splits(expressions), whole=whole, size=600))
    assert header["tokenizer.ggml.pre"] == SPLITS[key]
    assert header["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize(
    ("options", "prefix"), [({}, True), ({"prefix": False}, False), ({"metaspace": "first"}, True)]
)
def test_sentencepiece_keeps_the_order_of_its_merges(tmp_path: Path, options: dict[str, Any], prefix: bool) -> None:
    texts = tuple(text.lstrip() for text in TEXTS) if "metaspace" in options else TEXTS
    header = same_tokens(tmp_path, llama_cpp.sentencepiece(**options), texts)
    assert header["tokenizer.ggml.model"] == "llama"
    assert header["tokenizer.ggml.add_space_prefix"] == prefix
    assert header["tokenizer.ggml.add_bos_token"]
    kinds = header["tokenizer.ggml.token_type"]
    assert (kinds[:3], set(kinds[3:259])) == ([2, 3, 3], {6})


def test_special_and_added_tokens_are_found_in_a_text(tmp_path: Path) -> None:
    tokenizer = llama_cpp.byte_level(splits(next(iter(SPLITS))[0]))
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    header = same_tokens(tmp_path, tokenizer, ("one<|im_end|>two", "one <think> two"))
    tokens, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    number = tokens.index("<|im_end|>")
    assert (kinds[number], kinds[tokens.index("<think>")], kinds[-1]) == (3, 4, 5)
    assert tokens[-1] == f"[PAD{ROWS - 1}]"


def header_of(tokenizer: PreTrainedTokenizerFast, stops: list[int] | None = None) -> dict[str, Any]:
    return vocabulary(tokenizer, ROWS, stops or [], Progress())


def test_what_stands_around_a_text_is_asked_of_the_tokenizer() -> None:
    plain = llama_cpp.byte_level()
    assert header_of(plain)["tokenizer.ggml.add_bos_token"] is False
    around = llama_cpp.byte_level()
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = header_of(around, [1, 7])
    keys = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "eot_token_id")
    assert [found[f"tokenizer.ggml.{key}"] for key in keys] == [True, True, 0, 1, 7]
    odd = llama_cpp.byte_level()
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    with pytest.raises(InputError, match=r"tokens \[1\] around a text, beside bos_token_id 0"):
        header_of(odd)


def test_chat_templates_are_kept() -> None:
    tokenizer = llama_cpp.byte_level()
    assert "tokenizer.chat_template" not in header_of(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert header_of(tokenizer)["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "one", "tools": "two"}
    found = header_of(tokenizer)
    assert found["tokenizer.chat_template"] == "one"
    assert found["tokenizer.chat_template.tools"] == "two"
    assert found["tokenizer.chat_templates"] == ["tools"]


def _lower(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def _spaced(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _other(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def _plain(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_lower, "a normalizer Lowercase"),
        (_spaced, "a pre-tokenizer .ByteLevel"),
        (_other, r"a pre-tokenizer .*p\{L\}"),
        (_plain, "neither byte-level nor falls back to bytes"),
    ],
)
def test_text_that_llama_cpp_would_split_in_another_way_is_refused(
    change: Callable[[Tokenizer], None], says: str
) -> None:
    tokenizer = llama_cpp.byte_level()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=says):
        header_of(tokenizer)


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a vocabulary of the kind WordLevel"):
        header_of(word_tokenizer(20))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(InputError, match="Unigram"):
        header_of(PreTrainedTokenizerFast(tokenizer_object=unigram))
    with pytest.raises(InputError, match="has a token 299, but the embedding matrix 64 rows"):
        vocabulary(llama_cpp.byte_level(), 64, [], Progress())
    changed = llama_cpp.sentencepiece()
    changed.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(InputError, match="a step NFKC before"):
        header_of(changed)


def test_what_llama_cpp_does_in_another_way_is_told() -> None:
    ears = Ears()
    vocabulary(llama_cpp.sentencepiece(metaspace="first"), ROWS, [], ears)
    assert any("behind every special token" in text for text in ears.said)
    known = llama_cpp.sentencepiece()
    vocab = known.get_vocab()
    more = {text: len(vocab) + at for at, text in enumerate(("qq", "qqz", "qz"))}
    backend = Tokenizer(models.BPE(vocab | more, [("qq", "z")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = known.backend_tokenizer.normalizer
    vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), ROWS, [], ears)
    assert any("1 ways to join tokens are no merges" in text for text in ears.said)
    assert any("no token that ends a text" in text for text in ears.said)
