"""What the dense model's residual stream loses with some of the heads or channels of every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import RemovalProblem
from llmprune.pruning.criteria.reconstruct import least_squares
from llmprune.pruning.problem import GroupProblem
from llmprune.pruning.statistics import excluding
from llmprune.streaming.stream import BlockStream
from llmprune.structure.cut import Cut


def width_use(
    stream: BlockStream,
    cuts: Mapping[str, Sequence[Cut]],
    criterion: Criterion,
    step: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Pass the dense model's blocks once; the errors of the stream with every cut of a layer, each on its own.

    Args:
        stream: of the dense model, with the layers chosen and both streams, so that tokens are held out; nothing is
            pruned. Its Grams are weighted by the inverse norms of the stream.
        cuts: ways to remove inputs of a layer that adds to the residual stream, by its full name.
        criterion: chooses the inputs.
        step: called after every block.

    Returns:
        by full name, the error of every cut, see `removal_error`.

    Raises:
        InputError: what a layer gives is changed before it is added to the residual stream, or not added at all.
    """
    found: dict[str, list[float]] = {}
    for block in stream:
        adders = set(stream.residual_layers(block))
        for local, ref in block.layers.items():
            if local not in adders:
                raise InputError(
                    f"the outputs of {ref.name} do not add to the residual stream as they are, so what its inputs are "
                    "worth cannot be compared",
                    "name what is to go: channels:25%, heads:25%, blocks:20%, or several of them with +",
                )
        for group in stream.groups(block):
            name = group.refs[0].name
            found[name] = [removal_error(group.problem, cut.units, cut.count, criterion) for cut in cuts[name]]
        step()
    return found


def removal_error(problem: GroupProblem, units: Tensor, count: int, criterion: Criterion) -> float:
    """The error that remains once inputs of a layer are removed and the others are fitted by least squares.

    Inputs are chosen and weights W̃ fitted on the tokens that are not held out; on the others, with token weights S and
    so relative to the residual stream, the error is the mean over tokens and outputs of `‖S X (W̃ − W)ᵀ‖²`.

    Args:
        problem: of one layer, its statistics with held-out tokens.
        units: `(pools, units, size)`, int64, see `UnitRemoval`.
        count: number of units to be removed from every pool.
        criterion: chooses them; it needs nothing but the Gram.
    """
    (layer,), held = problem.layers, problem.stats.held
    assert held is not None
    weight, gram = layer.weight.double(), excluding(problem.stats, held).gram
    asked = RemovalProblem(weight, gram, units.to(gram.device))
    kept = asked.kept(criterion.select(asked, count).removed)
    change = -weight
    change[:, kept] += least_squares(weight, gram, kept)[0]
    return float((change * (change @ held.gram.double())).sum()) / len(weight)
