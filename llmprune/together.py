"""The blocks of a run: how they are streamed, how their groups are solved, and how several processes share that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from llmprune.block import Block, Group
from llmprune.errors import InputError
from llmprune.memory import mapped_memory
from llmprune.pattern import SparsityPattern
from llmprune.prepare import Prepared
from llmprune.problem import LayerSolution
from llmprune.ranks import Ranks
from llmprune.refine import batch_tokens
from llmprune.stream import BATCH_TOKENS, BlockStream
from llmprune.structure import scale_of


def spread_over(run: Prepared, ranks: Ranks) -> Prepared:
    """The same run by several processes.

    Raises:
        InputError: there are more of them than windows, or a stage cannot be spread.
    """
    if ranks.alone:
        return run
    windows = len(run.calibration.tokens)
    if windows < ranks.size:
        raise InputError(
            f"{ranks.size} processes cannot share {windows} calibration windows", "more --samples, or fewer processes"
        )
    for stage, asked in {"--refine": run.recipe.refine > 0, "--allocate": run.recipe.allocate != "uniform"}.items():
        if asked:
            neutral = {"--refine": "--refine 0", "--allocate": "--allocate uniform"}[stage]
            raise InputError(f"{stage} works in one process, and there are {ranks.size}", f"add {neutral}")
    solver = run.solver and replace(run.solver, ranks=ranks)
    remover = run.remover and replace(run.remover, solver=solver)
    return replace(run, solver=solver, remover=remover, ranks=ranks)


def stream_of(run: Prepared, windows: int, folder: Path, saved: dict[str, Any] | None = None) -> BlockStream:
    """This process's windows on their way through the blocks.

    Args:
        run: the job.
        windows: how many go through a block at once.
        folder: where hidden states rest that exceed the budget.
        saved: where a stopped run goes on.
    """
    return BlockStream(
        run.skeleton,
        run.ranks.share(run.tokens),
        batch_tokens=windows * run.calibration.tokens.shape[1],
        chosen=run.chosen,
        twin=run.recipe.twin,
        paired=run.recipe.targets == "dense",
        permute=run.recipe.permute,
        cuts={cut.name: cut.coupling for cut in run.structure.cuts} if run.structure else None,
        quiet=run.remover.quiet if run.remover else None,
        scales=run.recipe.method == "scaling",
        again=run.recipe.refine > 0,
        folder=folder,
        budget=run.job.activation_memory,
        saved=saved,
    )


def groups_of(run: Prepared, stream: BlockStream, block: Block) -> Iterator[Group]:
    """The groups of a block with the statistics of all processes' windows."""
    for group in stream.groups(block):
        names = [ref.name for ref in group.refs]
        group.problem = replace(group.problem, stats=run.ranks.summed(group.problem.stats, names))
        yield group


def windows_of(run: Prepared) -> int:
    """How many windows of the calibration text go through a block at once, if there is room for them."""
    samples, length = run.calibration.tokens.shape
    most = batch_tokens(run.calibration.tokens) if run.recipe.refine else BATCH_TOKENS
    return min(max(most // length, 1), samples)


def solve(
    run: Prepared, block: Block, group: Group, pattern: SparsityPattern | None
) -> tuple[list[LayerSolution], Tensor | None]:
    """Solve a group: remove inputs if its layer loses some, prune the weights if a pattern is asked for."""
    name = group.refs[0].name
    cut = run.structure.by_name.get(name) if run.structure else None
    pattern = pattern if name in run.plan.names else None
    if cut is not None and run.remover is not None:
        scale = scale_of(block, cut.coupling) if run.remover.scaled else None
        solutions, kept = run.remover.solve(group.problem, cut.units, cut.count, pattern, group.classes, scale)
        return run.ranks.agreed(solutions), run.ranks.of_first(kept)
    assert run.solver is not None
    assert pattern is not None
    solutions, order = run.solver.solve(group.problem, pattern, group.classes)
    return run.ranks.agreed(solutions), order


def follow(run: Prepared) -> None:
    """What all processes but the first do: forward their windows, solve their rows, keep what all have found."""
    run.ranks.meet()
    with TemporaryDirectory(dir=run.partial, ignore_cleanup_errors=True) as folder:
        stream = stream_of(run, windows_of(run), Path(folder))
        for block in stream:
            for group in groups_of(run, stream, block):
                with mapped_memory():
                    group.write(*solve(run, block, group, run.pattern))
    run.ranks.meet()
