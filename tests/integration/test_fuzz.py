"""Whatever is in a file or a flag: it is understood, or refused in our words; nothing else happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import with_header, word_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from llmprune.errors import InputError
from llmprune.knobs import SIZE
from llmprune.model.reader import INDEX, SINGLE, SafetensorsFolder
from llmprune.pipeline.state import STATE, read_state
from llmprune.progress import Progress
from llmprune.pruning.sparsity import parse_sparsity
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import calibration_tokens, load_tokens, save_tokens, token_batch

many = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ", "300")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
numbers = st.integers(-(2**70), 2**70) | st.integers(0, 64)
dtypes = st.sampled_from(["F32", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", ""]) | st.text(max_size=4)
entries = st.fixed_dictionaries(
    {"dtype": dtypes, "shape": st.lists(numbers, max_size=4), "data_offsets": st.lists(numbers, min_size=1, max_size=3)}
)


def explained(error: InputError) -> None:
    """A refusal says what to do."""
    assert error.hint


def read_all(folder: Path) -> None:
    """Open a folder, and read all that it says it holds."""
    try:
        found = SafetensorsFolder(folder)
        for name in found:
            assert isinstance(found[name], torch.Tensor)
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=200))
@example(raw=b"")
@example(raw=b"\xff" * 16)
@example(raw=with_header({}, b""))
def test_any_bytes_for_weights(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw)
    read_all(tmp_path)


@many
@given(
    header=json_values | st.dictionaries(st.text(max_size=6), entries | json_values, max_size=4),
    data=st.binary(max_size=64),
)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
def test_any_header_of_weights(header: Any, data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(with_header(header, data))
    read_all(tmp_path)


@many
@given(names=st.dictionaries(st.text(max_size=8), st.text(max_size=16) | st.just(SINGLE) | json_values, max_size=4))
@example(names={"a": SINGLE})
@example(names={"a": "\0"})
@example(names={"a": "x" * 300})
@example(names={"a": "\ud800"})
def test_any_names_in_an_index(names: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(save({"a": torch.zeros(4)}))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    read_all(tmp_path)


@many
@given(raw=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_index(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(raw)
    read_all(tmp_path)


def load(path: Path) -> None:
    try:
        batch = load_tokens(path, None, None, 50)
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 50
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=200))
def test_any_bytes_for_tokens(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(raw)
    load(path)


@many
@given(st.data())
def test_damaged_token_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(token_batch(torch.arange(24).view(4, 6), "some", 0), path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    load(path)


@many
@given(metadata=json_values, tokens=st.lists(st.lists(st.integers(-3, 60), min_size=2, max_size=2), max_size=3))
def test_any_metadata_of_tokens(metadata: Any, tokens: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    matrix = torch.tensor(tokens, dtype=torch.int64)
    path.write_bytes(save({"tokens": matrix}, {"llmprune": json.dumps(metadata), "format": "pt"}))
    load(path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(20)


rows = st.lists(st.dictionaries(st.sampled_from(["text", "messages", "a"]), json_values, max_size=3), max_size=3)
texts = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | rows.map(lambda found: json.dumps(found).encode())
    | rows.map(lambda found: "\n".join(map(json.dumps, found)).encode())
    | st.text(alphabet='text,messages"\r\n\t w1', max_size=60).map(lambda text: f"text{text}".encode())
)


@many
@given(raw=texts, ending=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]))
def test_any_calibration_text(raw: bytes, ending: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / f"text.{ending}"
    path.write_bytes(raw)
    try:
        reader = Reader(tokenizer, tmp_path, Progress())
        batch = calibration_tokens(str(path), reader, samples=1, seq_len=2, seed=0)
        assert batch.tokens.shape == (1, 2)
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_state_of_an_unfinished_run(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(raw)
    assert read_state(tmp_path / STATE) == {}


@many
@given(text=st.text(max_size=16) | st.text("0123456789:.%+ channelsd", max_size=20))
@example(text="channels:25%+heads:33%+2:4")
def test_any_sparsity(text: str) -> None:
    try:
        found = parse_sparsity(text)
    except InputError as error:
        explained(error)
        return
    assert parse_sparsity(found.name).name == found.name


@many
@given(text=st.text(max_size=12) | st.text("0123456789.KMGTiB ", max_size=12))
def test_any_size(text: str) -> None:
    try:
        assert SIZE.read(text) >= 0
    except InputError as error:
        explained(error)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0", 0), ("512MiB", 2**29), ("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("2k", 2000), ("7B", 7)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert SIZE.read(text) == wanted
