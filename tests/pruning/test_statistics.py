"""The running Gram is the Gram of all inputs, however they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef
from llmprune.pruning.linalg import error_terms, relative_error
from llmprune.pruning.problem import InputStats
from llmprune.pruning.statistics import ResidualTarget, RunningGram, RunningPair, output_residual_cross
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch_shards import whole_batches
from llmprune.streaming.capture import Batch
from llmprune.streaming.hooks import Observation
from llmprune.streaming.statistics import GroupStatistics, StatisticsOptions

CPU = torch.device("cpu")


def inputs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) @ torch.randn(shape[-1], shape[-1], generator=generator)


def running(width: int, *batches: Tensor) -> RunningGram:
    gram = RunningGram(width, CPU)
    for batch in batches:
        gram.add(batch)
    return gram


def exact(rows: Tensor) -> np.ndarray:
    X = rows.double().reshape(-1, rows.shape[-1]).numpy()
    return X.T @ X / len(X)


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_uneven_batches_sum_to_the_gram_of_all_rows(width: int) -> None:
    rows = inputs(301, width)
    stats = running(width, *rows.split([1, 17, 200, 0, 3, 80])).result()
    assert stats.tokens == 301
    assert stats.gram.dtype == torch.float32
    np.testing.assert_allclose(stats.gram, exact(rows), rtol=1e-5, atol=1e-5 * np.abs(exact(rows)).max())


def test_batches_of_any_rank_are_rows_of_inputs() -> None:
    rows = inputs(24, 6)
    flat = running(6, rows).result()
    for shaped in (rows.reshape(4, 6, 6), rows.reshape(2, 3, 4, 6), rows.reshape(24, 1, 6)):
        stats = running(6, shaped).result()
        assert stats.tokens == 24
        assert torch.equal(stats.gram, flat.gram)
    assert running(6, rows[0]).result().tokens == 1


def test_strided_inputs_are_read_in_their_own_order() -> None:
    rows = inputs(40, 12)
    for view in (rows[::2, ::3], rows.T.contiguous().T, rows.reshape(5, 8, 12).transpose(0, 1), rows[:1].expand(9, 12)):
        stats = running(view.shape[-1], view).result()
        np.testing.assert_allclose(stats.gram, exact(view), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_float32_whatever_the_inputs(dtype: torch.dtype) -> None:
    rows = inputs(500, 16).to(dtype)
    stats = running(16, *rows.split(33)).result()
    assert stats.gram.dtype == torch.float32
    np.testing.assert_allclose(stats.gram, exact(rows), rtol=1e-5, atol=1e-5 * np.abs(exact(rows)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_neither_saturates_nor_overflows(dtype: torch.dtype) -> None:
    assert torch.equal(running(2, *[torch.ones(512, 2, dtype=dtype)] * 16).result().gram, torch.ones(2, 2))
    assert torch.equal(running(2, torch.full((8, 2), 2.0**15, dtype=dtype)).result().gram, torch.full((2, 2), 2.0**30))


def test_gram_is_exactly_symmetric_and_positive() -> None:
    gram = running(65, *inputs(200, 65).split(37)).result().gram
    assert torch.equal(gram, gram.T)
    assert (gram.diagonal() > 0).all()
    assert torch.linalg.eigvalsh(gram.double()).min() > -1e-5 * gram.diagonal().max()


def test_an_input_that_is_always_zero_has_an_exactly_zero_row() -> None:
    rows = inputs(50, 9)
    rows[:, [2, 5]] = 0
    gram = running(9, rows).result().gram
    dead = [bool((row == 0).all()) for row in gram]
    assert dead == [at in (2, 5) for at in range(9)]


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 5)], [torch.zeros(3, 0, 5), torch.zeros(0, 4, 5)]])
def test_no_tokens_give_a_zero_gram_not_nan(batches: list[Tensor]) -> None:
    stats = running(5, *batches).result()
    assert stats.tokens == 0
    assert torch.equal(stats.gram, torch.zeros(5, 5))


def test_inputs_are_left_alone() -> None:
    rows = inputs(30, 8)
    before = rows.clone()
    running(8, rows).result()
    assert torch.equal(rows, before)


def test_same_batches_same_bytes() -> None:
    batches = inputs(100, 33).split(13)
    assert torch.equal(running(33, *batches).result().gram, running(33, *batches).result().gram)


def test_products_with_dense_outputs_judge_as_dense_inputs_do() -> None:
    """Errors from `XᵀY` are those from cross Grams, for all rows and for some."""
    dense, pruned, weight = inputs(200, 12), inputs(200, 12, seed=1), inputs(5, 12, seed=2)
    candidate, outputs = inputs(5, 12, seed=3), dense @ weight.T
    wide, narrow = RunningPair(12, CPU), RunningPair(12, CPU)
    for rows in torch.arange(200).split([70, 1, 129]):
        wide.add(pruned[rows], dense[rows])
        narrow.add(pruned[rows], ResidualTarget(outputs[rows] - pruned[rows] @ weight.T, outputs[rows]))
    by_inputs, by_outputs = wide.result(), narrow.result()
    assert by_outputs.cross is None
    assert by_outputs.dense is None
    assert relative_error(weight, candidate, by_outputs) == pytest.approx(
        relative_error(weight, candidate, by_inputs), rel=1e-5
    )
    parts = [error_terms(weight, candidate, by_outputs, rows) for rows in (slice(0, 2), slice(2, 5))]
    assert torch.tensor(parts).sum(0).tolist() == pytest.approx(error_terms(weight, candidate, by_inputs), rel=1e-5)
    for one, other in ((by_inputs, by_outputs), (by_inputs.held, by_outputs.held)):
        assert one is not None
        assert other is not None
        expected = output_residual_cross(weight, one)
        assert torch.allclose(
            output_residual_cross(weight, other), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("landing", [False, True])
@pytest.mark.parametrize("where", ["inputs", "dense", "landed"])
def test_statistics_that_are_not_finite_are_refused(where: str, landing: bool) -> None:
    """Whichever of them it is: of the dense model's activations, too."""
    tokens, (part,) = torch.zeros(2, 8, dtype=torch.int64), whole_batches(2, 2)
    batch = Batch(tokens, [], [], 0, (Activations(), None), part)
    values = {name: torch.randn(2, 8, 4) for name in ("inputs", "dense", "landed", "made")}

    def result() -> InputStats:
        layer = LayerRef("block.down", "down", (4, 4), False)
        running = GroupStatistics(StatisticsOptions(dense_targets=True), [layer], torch.device("cpu"))
        landed = values["landed"] if landing else None
        seen = Observation(values["inputs"], None if landed is None else torch.zeros(2, 8, 4))
        running.add(batch, seen, Observation(values["dense"], landed, values["made"]))
        return running.result()

    assert result().tokens == 16
    values[where][1, 7, 2] = torch.inf
    used = {"inputs", "landed"} if landing else {"inputs", "dense"}
    if where not in used:
        assert result().tokens == 16
        return
    with pytest.raises(InputError, match=r"'block\.down' hold NaN or Inf"):
        result()
