"""A pattern prunes exactly what was asked for, whatever the scores."""

from __future__ import annotations

import dataclasses
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.lowest import lowest
from llmprune.pruning.pattern import NM, PatternCheck, SparsityPattern, Unstructured, parse_pattern

HALF = Fraction(1, 2)
EXTREMES = [0.0, -0.0, torch.inf, -torch.inf, 1e38, -1e38, 1e-45, -1e-45, 1e-40, 1e-38, 1.0, -1.0]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

nm_patterns = st.integers(2, 8).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))
shares = st.integers(2, 24).flatmap(lambda b: st.builds(Fraction, st.integers(1, b - 1), st.just(b)))
patterns = nm_patterns | st.builds(Unstructured, shares, st.sampled_from(["row", "layer"]))
# Many ties, extreme values, or anything at all.
elements = st.sampled_from(
    [st.integers(0, 2).map(float), st.sampled_from(EXTREMES), st.floats(width=32, allow_nan=False)]
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[SparsityPattern, Tensor]:
    pattern = draw(patterns)
    width = draw(st.integers(1, 4)) * pattern.m if isinstance(pattern, NM) else draw(st.integers(1, 24))
    shape = (draw(st.integers(1, 4)), width)
    return pattern, torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=draw(elements))))


def cut(values: Tensor, pattern: SparsityPattern) -> list[list[float]]:
    """The groups in which a pattern counts, as lists."""
    if isinstance(pattern, NM):
        return values.reshape(-1, pattern.m).tolist()
    return values.tolist() if pattern.scope == "row" else [values.flatten().tolist()]


def quota(pattern: SparsityPattern, size: int) -> int:
    if isinstance(pattern, NM):
        return pattern.n
    share = Decimal(pattern.ratio.numerator * size) / Decimal(pattern.ratio.denominator)
    return int(share.quantize(Decimal(1), ROUND_HALF_UP))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        (" 4:8 ", NM(4, 8)),
        ("002:004", NM(2, 4)),
        ("999998:999999", NM(999998, 999999)),
        ("50%", Unstructured(HALF)),
        ("50 %", Unstructured(HALF)),
        ("+50.0%", Unstructured(HALF)),
        ("0.5", Unstructured(HALF)),
        (".5", Unstructured(HALF)),
        ("37.5%", Unstructured(Fraction(3, 8))),
        ("0.1%", Unstructured(Fraction(1, 1000))),
        ("5.%", Unstructured(Fraction(1, 20))),
        ("99.999999%", Unstructured(Fraction(99999999, 100000000))),
    ],
)
def test_parse_reads_what_was_written_exactly(text: str, pattern: SparsityPattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_parse_passes_the_scope_on(scope: str) -> None:
    assert parse_pattern("50%", scope) == Unstructured(HALF, scope)


OUT_OF_RANGE = ["4:2", "2:0", "0:4", "4:4", "0:0", "-0.1", "-50%", "0%", "-0", "0.0", "100%", "150%", "1", "2"]
EMPTY = ["", " ", ".", "%", ":", "+", "-", ".%", "2:", ":4"]
MALFORMED = ["2:4:8", "-2:4", "2:-4", "2 : 4", "2.0:4", "2:4%", "50%%", "%50", "1/2", "0,5", "0x1", "1_0%", "half"]
NOT_DECIMAL = ["nan", "nan%", "inf", "-inf", "1e-3", "1e1%", "1234567:12345678", "0.1234567890", "12345678901%"]
UNICODE = ["٢:٤", "٥٠%", "２:４", "²:4", "½", "2꞉4", "50٪", "50％", "2:4\x00", "５０%"]


@pytest.mark.parametrize("text", [*OUT_OF_RANGE, *EMPTY, *MALFORMED, *NOT_DECIMAL, *UNICODE])
def test_parse_refuses_with_a_hint(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_pattern(text)
    assert caught.value.exit_code == 2
    assert caught.value.message
    assert "2:4" in caught.value.hint


@given(st.text(max_size=12) | st.text("0123456789:.%+- e", max_size=14))
@settings(deadline=None, max_examples=300)
def test_parse_gives_a_pattern_or_an_input_error(text: str) -> None:
    try:
        pattern = parse_pattern(text)
    except InputError:
        return
    assert 0 < pattern.sparsity < 1


@given(nm_patterns | st.builds(lambda k: Unstructured(Fraction(k, 10**6)), st.integers(1, 10**6 - 1)))
@settings(deadline=None)
def test_name_is_read_back_as_the_same_pattern(pattern: SparsityPattern) -> None:
    assert parse_pattern(pattern.name) == pattern
    assert "%" in pattern.describe()


def test_description_leaves_no_doubt() -> None:
    assert NM(2, 4).describe() == "2:4, prunes 2 of every 4 weights, 50 %"
    assert NM(1, 4).describe() == "1:4, prunes 1 of every 4 weights, 25 %"
    assert "37.5 %" in Unstructured(Fraction(3, 8)).describe()
    assert "row" in Unstructured(HALF, "row").describe()
    assert "layer" in Unstructured(HALF, "layer").describe()


@pytest.mark.parametrize("text", ["0.00001%", "0.000000001", "33.333333333%", "99.999999999%"])
def test_name_of_a_share_of_many_digits_is_read_back_too(text: str) -> None:
    pattern = parse_pattern(text)
    assert parse_pattern(pattern.name) == pattern


@pytest.mark.parametrize("bad", [(4, 2), (0, 4), (4, 4), (-1, 4), (2, 0), (0, 0)])
def test_no_pattern_prunes_all_or_nothing_of_a_group(bad: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        NM(*bad)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1), Fraction(-1, 2), Fraction(3, 2)])
def test_no_pattern_prunes_all_or_nothing_of_a_layer(share: Fraction) -> None:
    with pytest.raises(InputError):
        Unstructured(share)


def test_patterns_are_values() -> None:
    assert len({NM(2, 4), NM(2, 4), Unstructured(HALF), Unstructured(Fraction(2, 4)), Unstructured(HALF, "row")}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        NM(2, 4).n = 3


def test_mismatch_says_why_not() -> None:
    assert NM(2, 4).mismatch(3, 12) == ""
    assert "10" in NM(2, 4).mismatch(4, 10)
    assert Unstructured(HALF, "row").mismatch(2, 7) == ""
    assert Unstructured(Fraction(1, 100), "layer").mismatch(10, 10) == ""
    assert "rounds to 0" in Unstructured(Fraction(1, 100), "row").mismatch(10, 10)
    assert "rounds to 10" in Unstructured(Fraction(99, 100), "row").mismatch(10, 10)


@given(shares, st.integers(0, 10**6))
@settings(deadline=None)
@example(HALF, 5)
@example(Fraction(1, 8), 4)
def test_count_rounds_halves_up(share: Fraction, size: int) -> None:
    assert Unstructured(share).count(size) == quota(Unstructured(share), size)


@given(scored())
@settings(deadline=None, max_examples=400)
def test_project_prunes_the_lowest_and_of_equals_the_first(case: tuple[SparsityPattern, Tensor]) -> None:
    pattern, score = case
    mask = pattern.project(score)
    assert mask.shape == score.shape
    assert mask.dtype == torch.bool
    for values, kept in zip(cut(score, pattern), cut(mask, pattern), strict=True):
        going = sorted(range(len(values)), key=values.__getitem__)[: quota(pattern, len(values))]
        assert [at for at, keep in enumerate(kept) if not keep] == sorted(going)


@given(scored())
@settings(deadline=None)
def test_project_is_idempotent(case: tuple[SparsityPattern, Tensor]) -> None:
    pattern, score = case
    mask = pattern.project(score)
    assert torch.equal(pattern.project(mask.float()), mask)
    surviving = torch.where(mask, score, -torch.inf)
    assert torch.equal(pattern.project(surviving.masked_fill(mask, 1.0)), mask)


@given(scored())
@settings(deadline=None)
def test_project_depends_on_order_alone(case: tuple[SparsityPattern, Tensor]) -> None:
    pattern, score = case
    ranks = torch.from_numpy(np.unique(score.numpy() + 0.0, return_inverse=True)[1]).reshape(score.shape)
    assert torch.equal(pattern.project(ranks.float()), pattern.project(score))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(HALF, "row"), Unstructured(Fraction(3, 8), "layer")])
def test_project_takes_every_float_dtype_contiguous_or_not(pattern: SparsityPattern, dtype: torch.dtype) -> None:
    score = torch.randint(0, 5, (24, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(pattern.project(score), pattern.project(score.float()))
    assert torch.equal(pattern.project(score.T.contiguous().T), pattern.project(score))


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_large_layers_of_few_values_are_counted_exactly(scope: str) -> None:
    pattern = Unstructured(Fraction(617, 1000), scope)
    score = torch.randint(0, 3, (257, 1023), generator=torch.Generator().manual_seed(1)).float()
    flat = score.numpy() if scope == "row" else score.numpy().reshape(1, -1)
    keep = np.ones_like(flat, dtype=bool)
    np.put_along_axis(keep, flat.argsort(axis=1, kind="stable")[:, : quota(pattern, flat.shape[1])], False, axis=1)
    assert np.array_equal(pattern.project(score).numpy(), keep.reshape(score.shape))


def test_minus_infinity_goes_first_and_plus_infinity_last() -> None:
    score = torch.tensor([[1.0, torch.inf, -torch.inf, 0.0, torch.inf, torch.inf, torch.inf, -torch.inf]])
    assert NM(2, 4).project(score).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]


def test_minus_zero_ties_with_zero() -> None:
    assert NM(1, 2).project(torch.tensor([[0.0, -0.0, -0.0, 0.0]])).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("count", range(6))
def test_lowest_takes_any_count(count: int) -> None:
    assert lowest(torch.zeros(2, 5), count).int().tolist() == [[1] * count + [0] * (5 - count)] * 2


@given(scored())
@settings(deadline=None)
def test_check_finds_no_violation_in_what_project_kept(case: tuple[SparsityPattern, Tensor]) -> None:
    pattern, score = case
    mask = pattern.project(score)
    found = pattern.check(mask.float())
    assert (found.violations, found.extra_zeros) == (0, 0)
    assert found.zeros == found.required == int((~mask).sum())
    assert not torch.isnan(torch.where(mask, score, 0.0)).any()
    found = pattern.check(torch.where(mask, score, 0.0))
    assert found.violations == 0
    assert found.extra_zeros == int((score[mask] == 0).sum())


@given(scored())
@settings(deadline=None)
def test_check_counts_missing_and_extra_zeros_group_by_group(case: tuple[SparsityPattern, Tensor]) -> None:
    pattern, weight = case
    zeros = [group.count(0.0) for group in cut(weight, pattern)]
    wanted = [quota(pattern, len(group)) for group in cut(weight, pattern)]
    found = pattern.check(weight)
    assert found.weights == weight.numel()
    assert found.zeros == sum(zeros)
    assert found.required == sum(wanted)
    assert found.violations == sum(max(n - z, 0) for n, z in zip(wanted, zeros, strict=True))
    assert found.extra_zeros == sum(max(z - n, 0) for n, z in zip(wanted, zeros, strict=True))


def test_a_group_with_too_many_zeros_does_not_excuse_another() -> None:
    weight = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1]])
    assert NM(2, 4).check(weight) == PatternCheck(weights=8, zeros=4, required=4, violations=2)
    assert NM(2, 4).check(weight).extra_zeros == 2
    assert Unstructured(HALF, "row").check(weight).violations == 0
    halves = weight.reshape(2, 4)
    assert Unstructured(HALF, "row").check(halves).violations == 2
    assert Unstructured(HALF, "layer").check(halves).violations == 0


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(HALF, "row"), Unstructured(Fraction(1, 4), "layer")])
def test_survivors_that_round_to_zero_are_extra_zeros(pattern: SparsityPattern) -> None:
    weight = torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) + 1.0
    weight[:, ::2] *= 1e-9
    mask = pattern.project(weight)
    stored = torch.where(mask, weight, 0.0).half()
    found = pattern.check(stored)
    assert int((~mask).sum()) == found.required
    assert found.violations == 0
    assert found.extra_zeros == int((mask[:, ::2]).sum())
    assert found.zeros == int((stored == 0).sum())


def test_nan_is_not_a_zero() -> None:
    assert NM(2, 4).check(torch.full((1, 4), torch.nan)).violations == 2


@pytest.mark.parametrize("spec", ["2:4", "1:4", "5:8", "50%", "70%", "0.1%"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_steps_rise_to_the_pattern_itself(spec: str, count: int) -> None:
    pattern = parse_pattern(spec, "row")
    steps = pattern.steps(count)
    assert steps[-1] == pattern
    assert 1 <= len(steps) <= count
    fractions = [step.sparsity for step in steps]
    assert fractions == sorted(set(fractions))
    assert all(step.scope == pattern.scope for step in steps)
