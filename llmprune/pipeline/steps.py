"""What all processes of a run do, in step: stream their windows, solve groups, train blocks, keep what they need."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import InputError, PruneError
from llmprune.pipeline.allocation import allocate
from llmprune.pipeline.context import Prepared
from llmprune.pipeline.state import AGAIN, OWN, keep, names_of, parsed, rank_folder
from llmprune.progress import Progress
from llmprune.pruning.linalg import error_terms, ratio
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import SparsityPattern, Unstructured
from llmprune.pruning.problem import LayerSolution
from llmprune.reporting.report import Refinement
from llmprune.runtime.memory import mapped_memory
from llmprune.runtime.oom import with_oom_retry
from llmprune.runtime.process_group import ProcessGroup
from llmprune.sources.generated import beginnings, check_room, go_on
from llmprune.sources.tokens import TokenBatch, load_tokens, save_tokens, token_batch
from llmprune.streaming.block import Block, Group
from llmprune.streaming.block_reconstruction import batch_tokens, refine
from llmprune.streaming.stream import BATCH_TOKENS, BlockStream
from llmprune.structure.cut import scale_of

WRITER = "the dense model"


def spread_over(run: Prepared, group: ProcessGroup) -> Prepared:
    """The same run by several processes.

    Raises:
        InputError: there are more of them than windows.
    """
    if group.is_single:
        return run
    windows = run.shape[0]
    if windows < group.world_size:
        raise InputError(
            f"{group.world_size} processes cannot share {windows} calibration windows",
            "more --samples, or fewer processes",
        )
    sharding = RowSharding(group)
    solver = run.solver and replace(run.solver, sharding=sharding)
    remover = run.remover and replace(run.remover, solver=solver)
    # Whether there is room to write text is the first process's to say: others may have more, or less.
    recipe = replace(run.recipe, own=group.broadcast_object(run.recipe.own))
    return replace(run, solver=solver, remover=remover, recipe=recipe, group=group, sharding=sharding)


def stream_of(run: Prepared, windows: int, saved: Sequence[dict[str, Any]] = ()) -> BlockStream:
    """This process's windows on their way through the blocks.

    Args:
        run: the job.
        windows: how many go through a block at once.
        saved: where a stopped run goes on, for every process; only the first must know.
    """
    saved = run.group.broadcast_object(list(saved))
    run.sharding.rows[:] = saved[0]["rows"] if saved else [0] * run.group.world_size
    stream = BlockStream(
        run.skeleton,
        run.tokens,
        batch_tokens=windows * run.shape[1],
        chosen=run.chosen,
        twin=run.recipe.twin,
        paired=run.recipe.targets == "dense",
        permute=run.recipe.permute,
        cuts={cut.name: cut.coupling for cut in run.structure.cuts} if run.structure else None,
        quiet=run.remover.quiet if run.remover else None,
        scales=run.recipe.method == "scaling",
        again=run.recipe.refine > 0,
        folder=rank_folder(run.partial, run.group.rank),
        budget=run.job.activation_memory,
        saved=saved[run.group.rank] if saved else None,
        group=run.group,
    )
    stream.rows = run.sharding.rows
    return stream


def windows_of(run: Prepared) -> int:
    """How many windows of the calibration text go through a block at once, if there is room for them."""
    samples, length = run.shape
    most = batch_tokens(samples * length) if run.recipe.refine else BATCH_TOKENS
    return min(max(most // length, 1), samples)


def with_own_text(run: Prepared, progress: Progress) -> Prepared:
    """The same run with the windows that the dense model writes; the first process writes them for all.

    They are kept with the finished blocks: another machine, or one that is otherwise busy, may draw others.
    """
    windows, kept = run.own_windows, run.partial / OWN
    if not windows:
        return run
    found: TokenBatch | None = None
    if run.group.is_main:
        with suppress(InputError):
            found = load_tokens(kept, windows, run.shape[1], run.source.config.get_text_config().vocab_size)
        if found is None:
            found = _written(run, progress)
            save_tokens(found, kept)
    tokens = found.tokens if found else torch.zeros(windows, run.shape[1], dtype=torch.int64)
    tokens = tokens.to(run.group.device)
    run.group.broadcast([tokens])
    return replace(run, own=token_batch(tokens.cpu(), WRITER, run.job.seed))


def _written(run: Prepared, progress: Progress) -> TokenBatch:
    windows = run.own_windows

    def attempt(at_once: int) -> Tensor:
        progress.start("writing text", windows)
        prompts = beginnings(run.calibration.tokens, windows, run.job.seed)
        text = go_on(run.skeleton, prompts, run.shape[1], run.job.seed, at_once, progress.step)
        progress.finish()
        return text

    at_once = min(check_room(run.skeleton, run.shape[1]), windows)
    return token_batch(with_oom_retry(attempt, at_once, progress), WRITER, run.job.seed)


def block_patterns(
    run: Prepared, known: Sequence[SparsityPattern | None], windows: int, progress: Progress
) -> Sequence[SparsityPattern | None]:
    """Every block's pattern: the one asked for, or its own share of it, from a first pass over the dense model.

    Args:
        run: the job.
        known: the patterns, if the first process knows them.
        windows: how many go through a block at once.
        progress: of the pass.
    """
    if run.recipe.allocate == "uniform" or not isinstance(run.pattern, Unstructured):
        return [run.pattern] * len(run.skeleton.blocks)
    if names := run.group.broadcast_object(names_of(known)):
        return parsed(names, run.pattern.scope)
    assert run.solver is not None
    progress.start("sharing out", len(run.skeleton.blocks))
    with TemporaryDirectory(dir=rank_folder(run.partial, run.group.rank), ignore_cleanup_errors=True) as spare:
        stream = BlockStream(
            run.skeleton,
            run.tokens,
            batch_tokens=windows * run.shape[1],
            chosen=run.plan.names,
            folder=Path(spare),
            budget=run.job.activation_memory,
            scales=run.recipe.method == "scaling",
            group=run.group,
        )
        patterns = allocate(stream, run.pattern, run.recipe.allocate, run.solver.method, progress.step)
    progress.finish()
    return parsed(run.group.broadcast_object(names_of(patterns)), run.pattern.scope)


def pattern_for(run: Prepared, group: Group, pattern: SparsityPattern | None) -> SparsityPattern | None:
    """What the weights of a group are to hold: nothing where its layers are only there to lose inputs."""
    return pattern if group.refs[0].name in run.plan.names else None


def solve(
    run: Prepared, block: Block, group: Group, pattern: SparsityPattern | None
) -> tuple[list[LayerSolution], Tensor | None]:
    """Solve a group: remove inputs if its layer loses some, prune the weights if they are to hold a pattern."""
    name = group.refs[0].name
    cut = run.structure.by_name.get(name) if run.structure else None
    if cut is not None and run.remover is not None:
        scale = scale_of(block.module, cut.coupling) if run.remover.scaled else None
        solutions, kept = run.remover.solve(group.problem, cut.units, cut.count, pattern, group.classes, scale)
        return run.sharding.agreed(solutions), run.sharding.agreed_order(kept)
    assert run.solver is not None
    assert pattern is not None
    solutions, order = run.solver.solve(group.problem, pattern, group.classes)
    # What was solved together is the same already, but for what came behind it.
    return run.sharding.agreed(solutions) if run.recipe.refit else solutions, order


def errors_of(run: Prepared, group: Group, stored: Sequence[Tensor]) -> list[float]:
    """The relative output errors of a group's layers with the weights as they are stored, every process its rows."""
    parts = [run.group.own_rows(len(weight)) for weight in stored]
    sums = [
        error_terms(layer.weight, weight, group.problem.stats, rows)
        for layer, weight, rows in zip(group.problem.layers, stored, parts, strict=True)
    ]
    totals = iter(run.group.sum([value for pair in sums for value in pair]))
    return [ratio(missed, next(totals)) for missed in totals]


def train(run: Prepared, block: Block) -> Refinement | None:
    """Refine a block whose groups are all solved, if the recipe says so."""
    return refine(block, run.recipe.refine, run.job.seed) if run.recipe.refine else None


def follow(run: Prepared) -> None:
    """What all processes but the first do: all that these functions do, and nothing else."""
    run = with_own_text(run, Progress())
    run.group.barrier()
    folder = rank_folder(run.partial, run.group.rank)
    try:
        folder.mkdir(exist_ok=True)
        with_oom_retry(partial(_follow, run), windows_of(run), Progress(), run.group)
    except OSError as error:
        raise PruneError(f"cannot write {folder}: {error.strerror or error}", AGAIN) from error
    run.group.final_barrier()


def _follow(run: Prepared, windows: int) -> None:
    patterns = block_patterns(run, (), windows, Progress())
    stream = stream_of(run, windows)
    for block in stream:
        for group in stream.groups(block):
            with mapped_memory():
                stored = group.write(*solve(run, block, group, patterns[block.index]))
                errors_of(run, group, stored)
        train(run, block)
        block.finish()
        keep(stream, rank_folder(run.partial, run.group.rank), lambda _: None)
