"""What is written on a grid is what the library of the format reads."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig

from llmprune.model.compressed_tensors import config_of, format_of, mismatch, pack, unpack, written, written_bytes
from llmprune.pruning.grid import parse_grid, spread_scale


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_the_library_packs_them(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(3, 2)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4:g32", "int4:g64", "int4:channel", "int8", "int8:g64", "fp8"])
def test_the_library_reads_the_very_weights(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grid = parse_grid(name).fitted([64], dtype)
    scale = (torch.rand(10, grid.groups(64)) / 50 + 0.001).to(dtype)
    codes = grid.nearest(torch.randn(10, 64) * grid.highest / 2)
    codes[3] = 0
    weight = (codes * spread_scale(scale.float(), 64)).to(dtype)
    tensors = dict(written("layer.weight", weight, scale, grid))
    assert sum(tensor.nbytes for tensor in tensors.values()) == written_bytes((10, 64), grid)
    scheme = QuantizationConfig(**config_of(grid, ["lm_head"])).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(format_of(grid))
    found = compressor.decompress({key.removeprefix("layer."): value for key, value in tensors.items()}, scheme)
    assert torch.equal(found["weight"], weight)
    assert found["weight"].dtype == dtype


def test_rows_that_do_not_fill_words_are_refused() -> None:
    assert (
        mismatch((4, 172), parse_grid("int4:channel"))
        == "172 inputs are not divisible by 8, the weights of a 32-bit word"
    )
    assert mismatch((4, 172), parse_grid("int8")) == ""
    assert mismatch((4, 171), parse_grid("fp8")) == ""
    assert "576 inputs are not divisible by 128" in mismatch((4, 576), parse_grid("int4:g128"))
