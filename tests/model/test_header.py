"""A header is what safetensors reads, or it is refused; what it claims costs nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import with_header
from safetensors import safe_open
from safetensors.torch import save_file

from llmprune.errors import InputError
from llmprune.model.header import parse_header
from llmprune.model.reader import SINGLE, SafetensorsFolder

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
]  # fmt: skip


def test_tensors_of_every_dtype_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(24).view(4, 6).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / SINGLE)
    folder = SafetensorsFolder(tmp_path)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert set(folder) == set(file.keys())
        for name, tensor in folder.items():
            wanted = file.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(tensor.contiguous().view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8))
    assert folder.nbytes == sum(tensor.nbytes for tensor in tensors.values())


GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I8", "shape": [4], "data_offsets": [24, 28]},
}


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("a", "dtype", "F33", "unknown dtype"),
        ("a", "dtype", [], "unknown dtype"),
        ("a", "shape", [2, 4], "24 bytes for F32 of shape"),
        ("a", "shape", [-2, -3], "has shape"),
        ("a", "shape", [2.0, 3.0], "has shape"),
        ("a", "shape", [True, 6], "has shape"),
        ("a", "shape", [2**62, 2**62], "24 bytes"),
        ("a", "shape", 6, "wrong form"),
        ("a", "data_offsets", [0, 24, 48], "wrong form"),
        ("a", "data_offsets", [24, 0], "-24 bytes"),
        ("b", "data_offsets", [20, 24], "begins at byte 20, the one before it ends at 24"),
        ("b", "data_offsets", [28, 32], "begins at byte 28"),
        ("b", "data_offsets", [2**64, 2**64 + 4], "has shape"),
    ],
)
def test_what_cannot_be_is_refused_by_the_tensors_name(name: str, key: str, value: Any, says: str) -> None:
    assert list(parse_header(json.dumps(GOOD))[1]) == ["a", "b"]
    bad = json.loads(json.dumps(GOOD))
    bad[name][key] = value
    with pytest.raises(ValueError, match=says):
        parse_header(json.dumps(bad))


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": {}}])
def test_metadata_are_texts(metadata: Any) -> None:
    with pytest.raises(ValueError, match="wrong form"):
        parse_header(json.dumps(GOOD | {"__metadata__": metadata or [1]}))


def many(count: int) -> bytes:
    """A file of so many numbers."""
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    return with_header(header, bytes(4 * count))


def test_many_tensors_are_read_in_linear_time(tmp_path: Path) -> None:
    """With a header that is parsed for every tensor it took minutes."""
    (tmp_path / SINGLE).write_bytes(many(8_000))
    folder, started = SafetensorsFolder(tmp_path), time.process_time()
    assert sum(float(tensor) for tensor in folder.values()) == 0
    assert time.process_time() - started < 10


def test_too_many_tensors_are_refused_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.header.MOST_TENSORS", 10)
    (tmp_path / SINGLE).write_bytes(many(11))
    with pytest.raises(InputError, match="it names 11 tensors, the most are 10"):
        SafetensorsFolder(tmp_path)
    names = {}
    for part in "ab":
        header = {f"{part}{i}": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]} for i in range(6)}
        (tmp_path / f"{part}.safetensors").write_bytes(with_header(header, bytes(24)))
        names |= dict.fromkeys(header, f"{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="more than 10 tensors"):
        SafetensorsFolder(tmp_path)
