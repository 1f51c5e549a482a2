"""The story of a run: every process runs the same lines; rank 0 also reads, writes and reports for all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from torch import Tensor

from llmprune.errors import complete
from llmprune.job import Job
from llmprune.pipeline.block_choice import choose_blocks
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.estimate import dry_run
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.report_builder import ReportBuilder
from llmprune.pipeline.size_choice import choose_sizes
from llmprune.pipeline.state import WorkerState
from llmprune.pipeline.steps import (
    block_patterns,
    block_stream,
    calibration_batch_size,
    calibration_windows,
    check_weights,
    compare_with_whole,
    errors_of,
    evaluate,
    generated_tokens,
    grid_for,
    pattern_for,
    reconstruct,
    remove_experts,
    verify_written,
)
from llmprune.pipeline.timing import Clock
from llmprune.pipeline.workdir import WEIGHTS, finished, open_workdir
from llmprune.progress import Progress
from llmprune.reporting.report import PruneReport
from llmprune.runtime.launch import launch
from llmprune.runtime.memory import mmap_large_allocations
from llmprune.runtime.oom import with_oom_retry
from llmprune.runtime.process_group import ProcessGroup

__all__ = ["dry_run", "prune"]


def prune(job: Job, progress: Progress | None = None) -> PruneReport:
    """Prune a model block by block, measure it before and after, and leave a folder that plain transformers loads.

    Args:
        job: what to do.
        progress: told what happens; `ProgressBars()` draws it, None is silent.

    Raises:
        InputError: the job cannot be done; nothing was written.
        PruneError: the run failed; nothing is left at `job.out`, but finished blocks are kept for the same job.
    """
    with launch(job.device) as (group, device):
        return _prune(replace(job, device=device), group, progress if progress and group.is_main else Progress())


def _prune(job: Job, group: ProcessGroup, progress: Progress) -> PruneReport:
    clock, main = Clock(), group.is_main
    with clock("total"):
        with clock("choose_sizes") if job.goal.size is not None else nullcontext():
            job = choose_sizes(job, group, progress)
        with clock("prepare"):
            run = prepare(job, progress, group)
            if report := finished(run, progress):
                return report
            builder = ReportBuilder(run, clock)
        with open_workdir(run, progress) as state:
            if main:
                with clock("prepare"):
                    state.check_compatible({WEIGHTS: check_weights(run, progress)})
                    if not state.streams:
                        compare_with_whole(run, progress)
                builder.report.fingerprint = dict(state.fingerprint)
            with clock("self_calibration") if run.generated_windows else nullcontext():
                generated = generated_tokens(run, progress)
                state.check_compatible(builder.add_generated(generated))
            windows = calibration_windows(run, generated)
            if main:
                with clock("dense_evaluation"):
                    state.dense = state.dense or evaluate(run, run.source.folder, "dense perplexity", progress)
            with clock("choose_blocks") if run.procedure.blocks else nullcontext():
                run = choose_blocks(run, windows, state, progress)
                builder.update(run)
            with clock("prune"):
                clock.add(state.seconds)
                group.barrier()
                attempt = partial(prune_blocks, run, windows, state, builder, progress)
                with_oom_retry(attempt, calibration_batch_size(run), progress, group)
            if main:
                with clock("verify"):
                    verify_written(run, builder.report, progress)
                with clock("pruned_evaluation"):
                    pruned = evaluate(run, run.unfinished, "pruned perplexity", progress)
                builder.add_evaluation(state.dense, pruned)
                builder.write(windows)
        with complete(run.out):
            group.final_barrier()
    return builder.report if main else replace(PruneReport.read(run.out), out=str(run.out))


def prune_blocks(
    run: RunContext, windows: Tensor, state: WorkerState, builder: ReportBuilder, progress: Progress, at_once: int
) -> None:
    """The heart of the run: one block in memory, its groups pruned in call order, one shard written.

    Args:
        run: the job.
        windows: all calibration windows, `(windows, length)`, int64.
        state: finished blocks, and where the next one is saved.
        builder: of the report.
        progress: told about every block.
        at_once: number of windows that pass through a block together.
    """
    clock = builder.clock
    with clock("allocate") if run.recipe.allocate != "uniform" else nullcontext():
        patterns = state.patterns = block_patterns(run, windows, at_once, state.patterns, progress)
    stream = block_stream(run, windows, at_once, state.streams, state.saved_rows)
    state.begin(run, builder.report)
    progress.start("pruning", stream.left)
    builder.start_blocks()
    for block in stream:
        with clock("experts") if run.procedure.experts else nullcontext():
            builder.add_mixtures(remove_experts(run, stream, block))
        for group in stream.groups(block):
            pattern, grid = pattern_for(run, group, patterns[block.index]), grid_for(run, group)
            with mmap_large_allocations():
                with clock("solve"):
                    solution = run.solver.solve(group.problem, pattern, grid)
                stored = group.write(solution.layers, solution.order)
                with clock("error"):
                    errors = errors_of(run, group, stored)
                    builder.add_group(group, pattern, solution.layers, stored, errors)
        with clock("reconstruct") if run.recipe.reconstruct else nullcontext():
            builder.add_reconstructions(reconstruct(run, stream, block))
        with clock("write"), mmap_large_allocations():
            state.write(block)
            block.finish()
            builder.add_block(block)
            state.commit(stream, builder.report)
        progress.step(1, f"error {builder.mean_block_error():.4f}")
    progress.finish()
    state.finish()
    builder.finish_blocks(stream.immovable, stream.dense)
