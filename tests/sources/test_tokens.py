"""Text becomes windows in one way only, and whoever has the provenance can make them again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from helpers import word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.sources.texts import DATASETS, Reader, text_pieces
from llmprune.sources.tokens import (
    TokenBatch,
    calibration_tokens,
    evaluation_tokens,
    load_tokens,
    save_tokens,
    shared_runs,
    token_batch,
)

CACHE = Path("unused")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word: `w7` is token 7."""
    return word_tokenizer(100)


@pytest.fixture
def count(tmp_path: Path) -> str:
    """A text that counts w1 w2 ... w98 over and over, 1000 words in all, and some words more."""
    path = tmp_path / "count.txt"
    path.write_text(" ".join(f"w{number % 98 + 1}" for number in range(1003)))
    return str(path)


def reader(tokenizer: Any, bos: str = "auto") -> Reader:
    return Reader(tokenizer, CACHE, Progress(), bos)


def calibrate(source: str, tokenizer: Any, samples: int = 5, seq_len: int = 10, seed: int = 0) -> TokenBatch:
    return calibration_tokens(source, reader(tokenizer), samples=samples, seq_len=seq_len, seed=seed)


def evaluate(source: str, tokenizer: Any, windows: int = 5, context: int = 10) -> TokenBatch:
    return evaluation_tokens(source, reader(tokenizer), windows=windows, context=context)


def whole_text(source: str, role: str = "calibration", tokens: int = 10, tokenizer: Any = None) -> str:
    """All pieces of a text."""
    return "".join(text_pieces(source, role, reader(tokenizer), tokens, 0))


def counted(start: int, stop: int) -> list[int]:
    """The ids of the counting text."""
    return [number % 98 + 1 for number in range(start, stop)]


def test_evaluation_windows_are_the_first_of_the_text_tokenised_once(count: str, tokenizer: Any) -> None:
    batch = evaluate(count, tokenizer)
    assert batch.tokens.flatten().tolist() == counted(0, 50)
    assert batch.tokens.dtype == torch.int64
    assert (batch.provenance.samples, batch.provenance.seq_len, batch.provenance.seed) == (5, 10, None)


def test_evaluation_takes_what_there_is_and_drops_the_rest(count: str, tokenizer: Any) -> None:
    assert evaluate(count, tokenizer, windows=10**6).tokens.flatten().tolist() == counted(0, 1000)
    assert evaluate(count, tokenizer, windows=10**6).provenance.samples == 100
    with pytest.raises(InputError, match="shorter than one window of 1004 tokens"):
        evaluate(count, tokenizer, context=1004)


def test_calibration_windows_do_not_overlap_and_do_not_repeat(count: str, tokenizer: Any) -> None:
    windows = calibrate(count, tokenizer, samples=100).tokens
    assert sorted(windows.tolist()) == sorted(counted(start, start + 10) for start in range(0, 1000, 10))


def test_the_seed_and_nothing_else_chooses_the_windows(count: str, tokenizer: Any) -> None:
    first = calibrate(count, tokenizer, seed=7)
    torch.manual_seed(123)
    random.seed(123)
    again = calibrate(count, tokenizer, seed=7)
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    other = calibrate(count, tokenizer, seed=8)
    assert other.provenance.sha256 != first.provenance.sha256
    assert other.provenance.seed == 8


def test_fewer_samples_are_a_part_of_more(count: str, tokenizer: Any) -> None:
    assert torch.equal(calibrate(count, tokenizer, samples=3).tokens, calibrate(count, tokenizer, samples=9).tokens[:3])


def test_too_little_text_says_how_much_there_is(count: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="gives 100 windows of 10 tokens, but 101 were asked for"):
        calibrate(count, tokenizer, samples=101)


def test_the_hash_is_that_of_the_ids_in_little_endian(count: str, tokenizer: Any) -> None:
    batch = calibrate(count, tokenizer)
    raw = b"".join(int(token).to_bytes(8, "little", signed=True) for token in batch.tokens.flatten())
    assert batch.provenance.sha256 == hashlib.sha256(raw).hexdigest()
    # The layout in memory plays no part.
    assert token_batch(batch.tokens.T.contiguous().T, "", None).provenance.sha256 == batch.provenance.sha256


def test_a_folder_is_its_text_files_in_order(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("w5 w6")
    (tmp_path / "a.txt").write_text("w1 w2")
    (tmp_path / "b" / "x.txt").write_text("w3 w4")
    (tmp_path / "note.md").write_text("w9")
    assert evaluate(str(tmp_path), tokenizer, windows=1, context=6).tokens.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_a_file_takes_precedence_over_a_data_set_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in DATASETS:
        Path(name).write_text("w1 w2")
        assert evaluate(name, tokenizer, windows=1, context=2).tokens.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"w1\0", "binary"), (b"w1 \xff", "not UTF-8.*byte 3")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        whole_text(str(tmp_path / "bad.txt"))
    with pytest.raises(InputError, match=says):
        whole_text(str(tmp_path))


# Frozen token files


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """A token file of 6 windows of 8 tokens."""
    path = tmp_path / "tokens.safetensors"
    save_tokens(token_batch(torch.arange(48).view(6, 8), "words", 3), path)
    return path


def test_a_token_file_gives_back_what_went_in(frozen: Path) -> None:
    batch = load_tokens(frozen, None, None, 48)
    assert torch.equal(batch.tokens, torch.arange(48).view(6, 8))
    assert batch.provenance.source == f"{frozen.name} (words)"
    assert batch.provenance.seed == 3
    assert batch.provenance.sha256 == token_batch(batch.tokens, "", None).provenance.sha256


def test_a_part_of_a_token_file_states_its_own_hash(frozen: Path) -> None:
    batch = load_tokens(frozen, 2, 5, 48)
    assert torch.equal(batch.tokens, torch.arange(48).view(6, 8)[:2, :5])
    assert (batch.provenance.samples, batch.provenance.seq_len) == (2, 5)
    assert batch.provenance.sha256 == token_batch(batch.tokens, "", None).provenance.sha256


@pytest.mark.parametrize(("samples", "seq_len"), [(7, None), (None, 9), (7, 9)])
def test_more_than_a_token_file_holds_is_refused(frozen: Path, samples: int | None, seq_len: int | None) -> None:
    with pytest.raises(InputError, match=r"holds \(6, 8\) tokens"):
        load_tokens(frozen, samples, seq_len, 48)


def test_ids_beyond_the_vocabulary_are_refused(frozen: Path) -> None:
    with pytest.raises(InputError, match="token id 47, the model's vocabulary ends at 46"):
        load_tokens(frozen, None, None, 47)


def rewrite(path: Path, tokens: Tensor, **metadata: str) -> None:
    save_file({"tokens": tokens}, path, metadata=metadata)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\1" + bytes(7)),
    "no metadata": lambda path: rewrite(path, torch.arange(4).view(2, 2)),
    "bad metadata": lambda path: rewrite(path, torch.arange(4).view(2, 2), llmprune_tokens="{"),
    "other metadata": lambda path: rewrite(path, torch.arange(4).view(2, 2), llmprune_tokens='{"a": 1}'),
    "list metadata": lambda path: rewrite(path, torch.arange(4).view(2, 2), llmprune_tokens="[]"),
    "other tensor": lambda path: save_file({"ids": torch.arange(4)}, path, metadata={"llmprune_tokens": "{}"}),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_token_file_is_refused(frozen: Path, damage: str) -> None:
    DAMAGES[damage](frozen)
    with pytest.raises(InputError):
        load_tokens(frozen, None, None, 48)


@pytest.mark.parametrize(
    "tokens", [torch.arange(4), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int32), torch.ones(0, 4)]
)
def test_other_than_windows_of_int64_is_refused(frozen: Path, tokens: Tensor) -> None:
    with safe_open(frozen, framework="pt") as file:
        metadata = file.metadata()
    save_file({"tokens": tokens}, frozen, metadata=metadata)
    with pytest.raises(InputError, match="not int64"):
        load_tokens(frozen, None, None, 48)


def test_negative_ids_are_refused(frozen: Path) -> None:
    save_tokens(token_batch(load_file(frozen)["tokens"] - 1, "words", 3), frozen)
    with pytest.raises(InputError, match="vocabulary"):
        load_tokens(frozen, None, None, 48)


# Overlap


def slow_shared_runs(a: Tensor, b: Tensor, length: int) -> float:
    def runs(windows: Tensor) -> list[tuple[int, ...]]:
        return [tuple(w[i : i + length].tolist()) for w in windows for i in range(windows.shape[1] - length + 1)]

    known, asked = set(runs(a)), runs(b)
    return sum(run in known for run in asked) / len(asked) if asked else 0.0


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_shared_runs_are_what_a_slow_count_finds(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 4, (3, size), generator=generator) for size in (9, 7))
    assert shared_runs(a, b, length) == pytest.approx(slow_shared_runs(a, b, length))


def test_a_copied_passage_is_found_wherever_it_stands() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 50_000, (4, 100), generator=generator) for _ in range(2))
    assert shared_runs(a, b) == 0
    b[2, 10:50] = a[3, 33:73]
    assert shared_runs(a, b) == pytest.approx((40 - 32 + 1) / (4 * (100 - 32 + 1)))
    assert shared_runs(a, a) == 1
    assert shared_runs(a[:, :20], a[:, :20]) == 0


# Hub data sets


class Stream:
    """A streamed data set that counts how many documents are pulled."""

    def __init__(self, text: str = "w1 " * 1000) -> None:
        self.text, self.pulled, self.shuffled = text, 0, None

    def shuffle(self, seed: int, buffer_size: int) -> Stream:
        self.shuffled = (seed, buffer_size)
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        while True:
            self.pulled += 1
            yield {"text": self.text}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub with endless data sets; `asked` is what was loaded."""
    state = SimpleNamespace(stream=Stream(), asked=[])

    def load_dataset(*arguments: object, **options: object) -> Stream:
        state.asked.append((arguments, options))
        return state.stream

    monkeypatch.setattr("llmprune.sources.texts.hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("name", ["c4", "fineweb-edu", "wikitext2"])
def test_a_data_set_is_streamed_and_no_more_of_it_than_needed(hub: SimpleNamespace, tokenizer: Any, name: str) -> None:
    batch = calibrate(name, tokenizer, samples=4, seq_len=100, seed=5)
    assert batch.tokens.shape == (4, 100)
    assert batch.provenance.source == name
    entry = DATASETS[name]
    assert hub.asked == [((entry.repo, entry.config), {"split": entry.calibration, "streaming": True})]
    # 3000 characters a document, 100 000 characters whatever is asked for.
    assert hub.stream.pulled <= (8 * 400 + 100_000) // 3000 + 2


def test_a_larger_job_pulls_more(hub: SimpleNamespace, tokenizer: Any) -> None:
    assert calibrate("c4", tokenizer, samples=100, seq_len=1000).tokens.shape == (100, 1000)
    assert hub.stream.pulled <= (8 * 100_000 + 100_000) // 3000 + 2


def test_calibration_is_shuffled_by_the_seed_and_evaluation_is_not(hub: SimpleNamespace, tokenizer: Any) -> None:
    calibrate("c4", tokenizer, seed=5)
    assert hub.stream.shuffled[0] == 5
    hub.stream = Stream()
    evaluate("c4", tokenizer)
    assert hub.stream.shuffled is None
    assert hub.asked[-1][1]["split"] == "validation"


def test_wikitext_is_joined_as_the_literature_does(hub: SimpleNamespace) -> None:
    hub.stream = Stream(" = Title = \n")
    text = whole_text("wikitext2", "evaluation", 1)
    assert text.startswith(" = Title = \n\n\n = Title = \n\n\n = Title")
    assert hub.stream.shuffled is None


def test_a_data_set_that_cannot_be_reached_is_an_error_with_a_way_out(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(InputError, match=r"the data set c4 \(allenai/c4\) cannot be read") as refusal:
        calibrate("c4", tokenizer)
    assert "sotu" in refusal.value.hint
    assert hub.asked == []


def test_an_unknown_name_is_refused_with_those_that_exist(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="there is no text 'c5'") as refusal:
        calibrate("c5", tokenizer)
    assert all(name in refusal.value.hint for name in DATASETS)
