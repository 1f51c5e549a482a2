"""The whole pruning run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmprune.errors import CheckError
from llmprune.export.verify import check_layers, patterns_of
from llmprune.job import Job
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.skeleton import Skeleton
from llmprune.model.writer import replace_folder
from llmprune.pipeline.context import Prepared
from llmprune.pipeline.estimate import Task, memory, product_rate, seconds
from llmprune.pipeline.prepare import prepare, with_room_to_write
from llmprune.pipeline.report_builder import (
    add_evaluation,
    add_own_text,
    coverage,
    describe,
    finish_report,
    highest,
    new_report,
    processes,
    steps_left_out,
    write_companions,
)
from llmprune.pipeline.state import Journal
from llmprune.pipeline.steps import (
    block_patterns,
    errors_of,
    follow,
    pattern_for,
    solve,
    spread_over,
    stream_of,
    train,
    windows_of,
    with_own_text,
)
from llmprune.pipeline.timing import Clock
from llmprune.pipeline.workdir import workplace
from llmprune.progress import Progress
from llmprune.pruning.recipe import EFFORTS
from llmprune.reporting.report import BlockReport, PruneReport
from llmprune.runtime.launch import join
from llmprune.runtime.memory import mapped_memory, resident_memory
from llmprune.runtime.oom import with_oom_retry
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.perplexity import Perplexity, perplexity
from llmprune.streaming.stream import BATCH_TOKENS


def prune(job: Job, progress: Progress | None = None) -> PruneReport:
    """Prune a model block by block, measure it before and after, and leave a folder that plain transformers loads.

    Args:
        job: what to do.
        progress: told what happens; `ProgressBars()` draws it, None is silent.

    Raises:
        InputError: the job cannot be done; nothing was written.
        PruneError: the run failed; nothing is left at `job.out`, but finished blocks are kept for the same job.
    """
    progress = progress or Progress()
    with join(job.device) as (group, device):
        job = replace(job, device=device)
        if group.is_main:
            return lead(job, group, progress)
        run = spread_over(group.main_process_first(lambda: prepare(job, Progress())), group)
        follow(run)
        return PruneReport.read(run.out)


def lead(job: Job, group: ProcessGroup, progress: Progress) -> PruneReport:
    """What the first process does, which is mostly the only one."""
    clock = Clock()
    with clock("total"):
        with clock("prepare"):
            run = spread_over(group.main_process_first(lambda: prepare(job, progress)), group)
            report = new_report(run)
            report.baseline_memory = resident_memory()
        with workplace(run, progress) as journal:
            with clock("prepare"):
                journal.agree({"the model's weights": check_weights(run, progress)})
            if run.own_windows:
                with clock("own_text"):
                    run = with_own_text(run, progress)
                journal.agree(add_own_text(run, report))
            with clock("dense_evaluation"):
                journal.dense = journal.dense or measure(run, run.source.folder, "dense perplexity", progress)
            with clock("prune"):
                clock.add(journal.seconds)
                group.barrier()
                blocks = partial(prune_blocks, run, journal, report, clock, progress)
                with_oom_retry(blocks, windows_of(run), progress, group)
            with clock("verify"):
                verify_written(run, report, progress)
            with clock("pruned_evaluation"):
                pruned = measure(run, run.unfinished, "pruned perplexity", progress)
            add_evaluation(run, report, journal.dense, pruned)
            report.seconds = dict(clock.seconds)
            report.processes = processes(run)
            write_companions(run, report)
            replace_folder(run.unfinished, run.out)
    finish_report(run, report, clock.seconds)
    group.final_barrier()
    return report


def dry_run(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """The plan of a run: layers, sizes, and an estimate of its time and memory; nothing is written.

    Raises:
        InputError: the job cannot be done.
    """
    run = prepare(job, progress or Progress())
    report = new_report(run).to_json()
    text = run.calibration.tokens
    evaluation = run.evaluation.tokens.numel() if run.evaluation else 0
    rate, budget = product_rate(), run.job.activation_memory
    task = Task(run.skeleton, run.plan, run.recipe, text.numel(), text.shape[1], evaluation, budget)

    return {
        **{key: report[key] for key in ("model", "sparsity", "method", "recipe", "coverage", "calibration", "out")},
        "layers": [{"name": layer.name, "shape": layer.shape} for layer in run.plan.layers],
        "size": {"dense": run.skeleton.checkpoint.folder.nbytes, "pruned": run.plan.out_bytes},
        "estimate": {"seconds": seconds(task, rate), "memory": memory(task)},
        "efforts": {name: seconds(at_effort(task, job.at(name)), rate) for name in EFFORTS},
    }


def at_effort(task: Task, job: Job) -> Task:
    """The same task with the recipe of another effort, as it would be run here."""
    return replace(task, recipe=with_room_to_write(job.recipe, job, task.skeleton, task.seq_len)[0])


def prune_blocks(
    run: Prepared, journal: Journal, report: PruneReport, clock: Clock, progress: Progress, windows: int
) -> None:
    """The heart of the run: one block in memory, its groups pruned in call order, one shard written."""
    with clock("allocate") if run.recipe.allocate != "uniform" else nullcontext():
        patterns = journal.patterns = block_patterns(run, journal.patterns, windows, progress)
    stream = stream_of(run, windows, journal.streams)
    journal.fill(report)
    writer = journal.writer()
    if not writer.shards:
        writer.write(run.skeleton.export_outside())
    progress.start("pruning", len(stream) - stream.done)
    began = time.perf_counter()
    for block in stream:
        first = len(report.layers)
        for group in stream.groups(block):
            pattern = pattern_for(run, group, patterns[block.index])
            with mapped_memory():
                with clock("solve"):
                    solutions, order = solve(run, block, group, pattern)
                stored = group.write(solutions, order)
                with clock("error"):
                    report.layers += describe(group, pattern, solutions, stored, errors_of(run, group, stored))
        with clock("refine") if run.recipe.refine else nullcontext():
            report.refinements += filter(None, [train(run, block)])
        with clock("write"), mapped_memory():
            writer.write(block.export())
            block.finish()
            now = time.perf_counter()
            report.blocks.append(BlockReport(block.name, round(now - began, 3), highest(report), resident_memory()))
            began = now
            report.seconds = clock.so_far()
            journal.save(stream, report, writer)
        errors = [layer.error for layer in report.layers[first:]]
        progress.step(1, f"error {sum(errors) / max(len(errors), 1):.4f}")
    progress.finish()
    writer.seal()
    report.warnings += [*stream.unmoved, *steps_left_out(report)]
    report.coverage = coverage(run.plan.without(stream.uncalled, "weight used without a call"))


def check_weights(run: Prepared, progress: Progress) -> str:
    """Read every weight once: a damaged file is found now, not after hours. Returns the hash of all."""
    progress.start("checking weights", run.skeleton.checkpoint.folder.nbytes, "B")
    digest = run.skeleton.checkpoint.check_finite(progress.step)
    progress.finish()
    return digest


def measure(run: Prepared, folder: Path, label: str, progress: Progress) -> Perplexity | None:
    """The perplexity of the model in `folder`, or None if the job does not ask for it."""
    if run.evaluation is None:
        return None
    skeleton, tokens, budget = skeleton_of(run, folder), run.evaluation.tokens, run.job.activation_memory
    samples, length = tokens.shape

    def attempt(windows: int) -> Perplexity:
        progress.start(label, len(skeleton.blocks) + 1)
        with TemporaryDirectory(dir=run.partial) as spare:
            result = perplexity(skeleton, tokens, progress.step, Path(spare), budget, windows * length)
        progress.finish()
        return result

    return with_oom_retry(attempt, min(max(BATCH_TOKENS // length, 1), samples), progress)


def skeleton_of(run: Prepared, folder: Path) -> Skeleton:
    """The job's model with the weights in `folder`, computing as the run does."""
    return Skeleton(
        run.source.config if folder == run.source.folder else run.config,
        SafetensorsFolder(folder),
        compute=run.skeleton.compute,
        device=run.skeleton.device,
        trust_remote_code=run.job.trust_remote_code,
    )


def verify_written(run: Prepared, report: PruneReport, progress: Progress) -> None:
    """Re-open the written files, check all shapes against the config, and the pattern of every pruned layer.

    Raises:
        CheckError: a layer misses zeros.
    """
    patterns = patterns_of(report)
    layers = [(ref, patterns[ref.name]) for ref in run.plan.layers if ref.name in patterns]
    progress.start("verifying", len(layers))
    checks = check_layers(skeleton_of(run, run.unfinished).checkpoint, layers, progress.step)
    progress.finish()
    if bad := [check for check in checks if check.violations]:
        raise CheckError(f"{bad[0].name!r} misses {bad[0].violations} zeros of {run.goal.name}", "please report this")
