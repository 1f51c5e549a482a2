"""What is taken apart comes back bit for bit, in as few bytes as the formula says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.export import positions
from llmprune.export.positions import BITS, decode, encode, fits, position_bits, shapes
from llmprune.pruning.pattern import NM

PATTERNS = st.integers(2, 20).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))
SIZES = st.sampled_from(sorted(BITS))


def random_bits(pattern: NM, rows: int, groups: int, size: int, seed: int) -> Tensor:
    """Random bits in a random mask of the pattern; some of the kept ones are zero, too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * pattern.m)
    bits = torch.randint(0, 256, (rows, shape[1] * size), generator=generator, dtype=torch.uint8).view(BITS[size])
    keep = pattern.project(torch.rand(shape, generator=generator))
    some = torch.rand(shape, generator=generator) < 0.9
    return bits.masked_fill(~(keep & some), 0)


def reference(bits: Tensor, pattern: NM) -> tuple[list[list[int]], list[bytes]]:
    """The same by hand: values, and positions as one long number a row."""
    width, keep = math.ceil(math.log2(pattern.m)), pattern.m - pattern.n
    values, packed = [], []
    for row in bits.tolist():
        kept, number, at = [], 0, 0
        for start in range(0, len(row), pattern.m):
            group = row[start : start + pattern.m]
            zeros = [place for place in range(pattern.m) if group[place] == 0][: pattern.n]
            for place in range(pattern.m):
                if place not in zeros:
                    kept.append(group[place])
                    number |= place << at
                    at += width
        assert len(kept) == len(row) // pattern.m * keep
        values.append(kept)
        packed.append(number.to_bytes(math.ceil(at / 8), "little"))
    return values, packed


@given(PATTERNS, st.integers(1, 5), st.integers(1, 5), SIZES, st.integers(0, 2**32))
@settings(deadline=None)
def test_a_weight_comes_back_bit_for_bit(pattern: NM, rows: int, groups: int, size: int, seed: int) -> None:
    bits = random_bits(pattern, rows, groups, size, seed)
    assert fits(bits, pattern)
    values, places = encode(bits, pattern)
    assert (values.shape, places.shape) == shapes(pattern, *bits.shape)
    assert (values.tolist(), [bytes(row.tolist()) for row in places]) == reference(bits, pattern)
    again = decode(values, places, pattern)
    assert again.dtype == bits.dtype
    assert torch.equal(again, bits)


@pytest.mark.parametrize("chunk", [1, 40, 64, 10**9])
def test_the_number_of_rows_at_a_time_is_of_no_account(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = random_bits(NM(2, 4), 7, 5, 2, 0)
    values, places = encode(bits, NM(2, 4))
    monkeypatch.setattr(positions, "CHUNK", chunk)
    assert all(torch.equal(*pair) for pair in zip(encode(bits, NM(2, 4)), (values, places), strict=True))
    assert torch.equal(decode(values, places, NM(2, 4)), bits)
    assert fits(bits, NM(2, 4))


def test_a_negative_zero_is_a_value() -> None:
    weight = torch.tensor([[1.0, -0.0, 0.0, 0.0], [-0.0, 0.0, -0.0, 0.0]])
    values, places = encode(weight.view(torch.int32), NM(2, 4))
    again = decode(values, places, NM(2, 4)).view(torch.float32)
    assert torch.equal(again.view(torch.int32), weight.view(torch.int32))
    assert not fits(torch.tensor([[1.0, -0.0, 2.0, 0.0]]).view(torch.int32), NM(2, 4))


@pytest.mark.parametrize(("n", "m", "bits"), [(1, 2, 1), (2, 4, 2), (4, 8, 3), (1, 9, 4), (8, 16, 4), (1, 17, 5)])
def test_a_position_takes_the_fewest_whole_bits(n: int, m: int, bits: int) -> None:
    assert position_bits(NM(n, m)) == bits == math.ceil(math.log2(m))


def test_two_of_four_in_bfloat16_takes_nine_sixteenths() -> None:
    (rows, kept), (_, packed) = shapes(NM(2, 4), 64, 128)
    assert rows * (2 * kept + packed) / (64 * 128 * 2) == 0.5625


@pytest.mark.parametrize("damage", [0b00, 0b01, 0b1111])
def test_positions_that_do_not_rise_are_refused(damage: int) -> None:
    values, places = encode(torch.tensor([[5, 6, 0, 0]]), NM(2, 4))
    assert places.tolist() == [[0b0100]]
    with pytest.raises(ValueError, match="2:4"):
        decode(values, torch.tensor([[damage]], dtype=torch.uint8), NM(2, 4))


def test_positions_beyond_the_group_are_refused() -> None:
    values, places = encode(torch.tensor([[0, 0, 7]]), NM(2, 3))
    assert places.tolist() == [[2]]
    with pytest.raises(ValueError, match="2:3"):
        decode(values, torch.tensor([[3]], dtype=torch.uint8), NM(2, 3))
