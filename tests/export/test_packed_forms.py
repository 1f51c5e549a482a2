"""Codes in 32-bit words are packed and come back bit for bit, and lie where a reading by hand finds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.export.packed import Layout
from llmprune.export.packed_forms import FORMS, Codes, Elements
from llmprune.model.compressed_tensors import pack
from llmprune.model.header import Field
from llmprune.pruning.pattern import NM

PATTERNS = st.sampled_from([NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(4, 8), NM(7, 8), NM(9, 16)])


def random_codes(pattern: NM, rows: int, width: int, bits: int, seed: int) -> Tensor:
    """Codes of all values in a random mask of the pattern; some of the kept ones are zero, too."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (rows, width), generator=generator, dtype=torch.int8)
    return codes.masked_fill(~pattern.project(torch.rand(rows, width, generator=generator)), 0)


def layout_of(codes: Tensor, pattern: NM, bits: int) -> tuple[Layout, Tensor]:
    words = pack(codes, bits)
    field = Field("I32", tuple(words.shape), 0, words.nbytes)
    return Layout(pattern, {"w": field}, {"w": Codes(bits)}), words.view(torch.uint8).flatten()


@given(PATTERNS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(0, 2**32))
@settings(deadline=None)
def test_words_come_back_bit_for_bit(pattern: NM, rows: int, groups: int, bits: int, seed: int) -> None:
    codes = random_codes(pattern, rows, 16 * groups, bits, seed)
    layout, data = layout_of(codes, pattern, bits)
    assert not layout.obstacle("w")
    assert layout.shape("w") == (rows, 16 * groups)
    parts, stored = layout.parts("w"), dict(layout.encode("w", data))
    assert [(tuple(t.shape), t.nbytes) for t in stored.values()] == [part[1:] for part in parts.values()]
    flat = [tensor.contiguous().flatten() for tensor in stored.values()]
    assert torch.equal(layout.decode("w", *flat), data)
    kept = 16 * groups * (pattern.m - pattern.n) // pattern.m
    numbers, values = read_by_hand(stored["w.values"], bits, kept), codes.tolist()
    for row, found in zip(values, numbers, strict=True):
        assert [code for code in found if code] == [code for code in row if code]
        assert len(found) == kept


def read_by_hand(stored: Tensor, bits: int, kept: int) -> list[list[int]]:
    """The numbers of so many bits in every row of bytes, from the lowest bit on, in two's complement."""
    rows = []
    for row in stored.tolist():
        number = int.from_bytes(bytes(row), "little")
        found = [number >> bits * at & (2**bits - 1) for at in range(8 * len(row) // bits)]
        assert not any(found[kept:])
        rows.append([code - 2**bits if code >= 2 ** (bits - 1) else code for code in found[:kept]])
    return rows


@pytest.mark.parametrize(("bits", "size"), [(4, 3.0), (8, 5.0)])
def test_two_of_four_takes_three_and_five_bits(bits: int, size: float) -> None:
    layout, _ = layout_of(torch.zeros(6, 64, dtype=torch.int8), NM(2, 4), bits)
    assert layout.sizes("w")[1] * 8 / (6 * 64) == size


def test_what_is_no_matrix_of_words_is_told() -> None:
    assert "no words of int4" in Codes(4).obstacle(Field("F32", (4, 4), 0, 64))
    assert "no words of int8" in Codes(8).obstacle(Field("I32", (16,), 0, 64))
    assert "no whole bytes" in Elements().obstacle(Field("F32", (16,), 0, 64))
    assert FORMS.keys() == {"out,in", "in,out", "int4", "int8"}
