"""A long text gives the ids that it gives as a whole, and of a longer one no more is read than needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import word_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmprune.progress import Progress
from llmprune.sources import tokenize, tokens
from llmprune.sources.texts import Reader
from llmprune.sources.tokenize import separable, text_ids, token_ids
from llmprune.sources.tokens import calibration_tokens, evaluation_tokens

LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def prose(words: int, seed: int = 0) -> str:
    """Words, punctuation, numbers, accents, other scripts, double spaces and blank lines."""
    choice = random.Random(seed).choice
    known = [
        "the",
        "cat",
        "it's",
        "naïve",
        "über",
        "42",
        "3.14",
        "(well)",
        "end.",
        "日本語。",
        "don't",
        "a",
        "x=1;",
        "—",
    ]
    between = [" "] * 12 + ["\n", "\n\n", "  ", "\t", "   "]
    return "".join(choice(known) + choice(between) for _ in range(words))


def bpe(pre: Any = None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(prose(500).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(prose(500).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False),
    ]
    return pre_tokenizers.Sequence(parts)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "GPT-2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": lambda: bpe(split(LLAMA3)),
    "Llama 2": lambda: bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "Gemma": lambda: bpe(pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    "Metaspace": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Unigram": unigram,
    "words": lambda: word_tokenizer(50),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [37, 100_000])
def test_pieces_give_the_ids_of_the_whole(kind: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PIECE", 1000)
    monkeypatch.setattr(tokenize, "CONTEXT", 64)
    tokenizer, text = KINDS[kind](), prose(4000, seed=1)
    pieces = list(separable((text[at : at + part] for at in range(0, len(text), part)), tokenizer))
    assert len(pieces) >= len(text) // 1000 - 1
    assert max(map(len, pieces)) <= 1000 + 64
    assert [token for piece in pieces for token in token_ids(piece, tokenizer)] == token_ids(text, tokenizer)
    assert text_ids([text], tokenizer) == token_ids(text, tokenizer)


def test_a_text_that_cannot_be_cut_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PIECE", 1000)
    tokenizer = KINDS["GPT-2"]()
    for text in ("a" * 5000, " " * 5000):
        assert list(separable([text], tokenizer)) == [text]
    text = "a" * 5000 + prose(1000)
    pieces = list(separable([text], tokenizer))
    assert len(pieces[0]) > 5000
    assert [token for piece in pieces for token in token_ids(piece, tokenizer)] == token_ids(text, tokenizer)


def test_short_texts_are_tokenised_at_once() -> None:
    text = prose(2000)
    assert list(separable([text[:500], text[500:]], word_tokenizer(50))) == [text]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self) -> None:
        self.inner, self.characters, self.longest = word_tokenizer(100), 0, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters, self.longest = self.characters + len(text), max(self.longest, len(text))
        return self.inner(text, **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB of words; the first piece of a megabyte is `w1`, the second `w2`, and so on."""
    path = tmp_path_factory.mktemp("large") / "large.txt"
    path.write_text("".join(f"w{number} " * (10**6 // 3) for number in range(1, 10)) * 2 + "w99 " * 500_000)
    assert path.stat().st_size > 19.9e6
    return path


def test_of_a_large_text_only_the_first_part_is_drawn_from(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "DRAWN_CHARACTERS", 2**21)
    tokenizer: Any = Counting()
    batch = calibration_tokens(
        str(large), Reader(tokenizer, large.parent, Progress(), "no"), samples=200, seq_len=64, seed=0
    )
    assert batch.provenance.characters is not None
    assert 2**21 <= batch.provenance.characters < 2**21 + tokenize.PIECE + tokenize.CONTEXT
    assert tokenizer.characters < 1.5 * 2**21
    assert tokenizer.longest <= tokenize.PIECE + tokenize.CONTEXT
    # From all of that part, and from nothing behind it.
    assert set(batch.tokens.unique().tolist()) == {1, 2, 3}


def test_more_is_read_where_the_windows_need_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "DRAWN_CHARACTERS", 1000)
    tokenizer: Any = Counting()
    wanted = 40 * 10_000
    batch = calibration_tokens(
        str(large), Reader(tokenizer, large.parent, Progress(), "no"), samples=40, seq_len=10_000, seed=0
    )
    assert batch.tokens.shape == (40, 10_000)
    assert batch.provenance.characters is not None
    assert 3 * wanted <= batch.provenance.characters < 3 * wanted + tokenize.PIECE + tokenize.CONTEXT


def test_for_the_first_windows_no_more_than_one_piece_is_read(large: Path) -> None:
    tokenizer: Any = Counting()
    batch = evaluation_tokens(str(large), Reader(tokenizer, large.parent, Progress(), "no"), windows=3, context=100)
    assert batch.tokens.tolist() == [[1] * 100] * 3
    assert batch.provenance.characters is None
    assert tokenizer.characters < 1.1 * tokenize.PIECE
