"""A GGUF file gives its own weights, or none; what is wrong with it is found before a library believes it."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import BLOCKS, shapes, write_gguf
from transformers import AutoTokenizer

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.ownership import LOCK, MARK
from llmprune.sources.bos import added_tokens
from llmprune.sources.gguf import cached_gguf, check_gguf
from llmprune.sources.gguf_header import MOST_ITEMS, read_gguf_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def refused(file: Path, says: str) -> None:
    """The file is refused, and nothing of it stays in the cache."""
    cache = file.parent / "cache"
    with pytest.raises(InputError, match=says) as error:
        cached_gguf(file, cache, Progress())
    assert error.value.hint
    assert not list(cache.rglob("*"))


def test_what_a_killed_conversion_left_is_removed_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    for name in (".old-0123.making", ".mine.making"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".old-0123.making" / LOCK).write_bytes(MARK)
    folder = cached_gguf(whole, tmp_path, Progress())
    assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / ".mine.making"])


def test_the_header_is_what_was_written(whole: Path) -> None:
    header = read_gguf_header(whole)
    assert header.shapes == {name: shape[::-1] for name, shape in shapes().items()}
    assert header.values["llama.block_count"] == BLOCKS
    assert header.values["general.architecture"] == "llama"
    assert not header.contradiction()


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"],
)
def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "x.gguf", without=name), f"lacks 1 tensors? of LlamaForCausalLM, first '{name}'")


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight"])
def test_a_file_with_nan_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "x.gguf", poison=name), "hold NaN or Inf")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                                 "attention.head_count_kv", "vocab_size"])  # fmt: skip
@pytest.mark.parametrize("value", [10**6, 2**32 - 1, 2**63, -1])
def test_sizes_beyond_what_is_there_are_refused(key: str, value: int, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "x.gguf", changes={key: value}), f"llama.{key} is {value}, but 21 tensors hold")


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "attention.head_count_kv", "block_count"])
@pytest.mark.parametrize("value", [0, 1, 3])
def test_other_sizes_are_refused_too(key: str, value: int, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "x.gguf", changes={key: value}), r"x\.gguf")


FACTORS = np.full(8, 3, np.float32)


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, r"scaling\.type linear"),
        ({"scaling.type": "yarn"}, r"scaling\.type yarn"),
        ({"scaling.factor": 8.0}, r"scaling\.factor 8\.0"),
        ({"scale_linear": 2.0}, r"scale_linear 2\.0"),
        ({"rope_freqs.weight": FACTORS}, r"rope_freqs\.weight"),
        ({"rope_factors_long.weight": FACTORS}, r"rope_factors_long\.weight"),
    ],
)
def test_scaled_positions_are_refused_for_transformers_reads_none(
    rope: dict[str, Any], says: str, tmp_path: Path
) -> None:
    refused(write_gguf(tmp_path / "x.gguf", rope=rope), rf"scales rotary positions \({says}\)")


def test_settings_that_scale_nothing_are_taken(tmp_path: Path) -> None:
    check_gguf(write_gguf(tmp_path / "x.gguf", rope={"scaling.type": "none", "scaling.factor": 1.0}))


def test_counts_that_cannot_be_are_refused_at_once(whole: Path, tmp_path: Path) -> None:
    raw = whole.read_bytes()
    strings = raw.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    for at, number in ((8, 2**60), (16, 2**60), (24, 2**62), (strings + 8, 2**40), (8, MOST_ITEMS + 1), (16, 10**6)):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(raw[:at] + struct.pack("<Q", number) + raw[at + 8 :])
        with pytest.raises(InputError, match="not a readable GGUF file"):
            check_gguf(bad)


def test_any_damage_to_a_header_is_understood_or_refused(whole: Path, tmp_path: Path) -> None:
    raw, chance, bad = whole.read_bytes(), random.Random(0), tmp_path / "bad.gguf"
    for _ in range(300):
        broken = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            broken[chance.randrange(8000)] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        bad.write_bytes(broken[: chance.choice([len(raw), chance.randrange(len(raw))])])
        with suppress(InputError):
            check_gguf(bad)


@pytest.mark.parametrize(("bos", "begin"), [(None, [1]), (True, [1]), (False, [])])
def test_texts_begin_as_the_file_says(bos: bool | None, begin: list[int], tmp_path: Path) -> None:
    """Llama's tokenizers add BOS where the file does not say."""
    folder = cached_gguf(write_gguf(tmp_path / "x.gguf", bos=bos), tmp_path / "cache", Progress())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("word1 word2", add_special_tokens=False)["input_ids"]
    assert tokenizer("word1 word2")["input_ids"] == [*begin, *plain]
    assert added_tokens(tokenizer) == tuple(begin)
