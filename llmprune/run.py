"""The whole pruning run."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llmprune.block import Group
from llmprune.checkpoint import SafetensorsFolder, copy_companions, replace_folder, write_json
from llmprune.errors import CheckError
from llmprune.estimate import Task, memory, product_rate, seconds
from llmprune.html_report import write_report
from llmprune.hub import model_card
from llmprune.job import Job
from llmprune.launch import join
from llmprune.memory import mapped_memory, peak_memory, resident_memory
from llmprune.pattern import SparsityPattern
from llmprune.perplexity import Perplexity, perplexity
from llmprune.plan import Plan
from llmprune.prepare import Prepared, prepare
from llmprune.problem import LayerSolution
from llmprune.progress import Progress
from llmprune.ranks import Ranks
from llmprune.recipe import AUTO, DEFAULT_EFFORT, EFFORTS
from llmprune.report import BlockReport, LayerReport, PruneReport
from llmprune.resume import Journal, workplace
from llmprune.room import with_room
from llmprune.skeleton import Skeleton
from llmprune.spectrum import input_spectrum
from llmprune.stream import BATCH_TOKENS
from llmprune.together import (
    block_patterns,
    errors_of,
    follow,
    solve,
    spread_over,
    stream_of,
    train,
    windows_of,
    with_own_text,
)
from llmprune.verify import check_layers, patterns_of

EXPLODED = 10.0


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
    with join(job.device) as (ranks, device):
        job = replace(job, device=device)
        if ranks.number == 0:
            return lead(job, ranks, progress)
        run = spread_over(ranks.in_turn(lambda: prepare(job, Progress())), ranks)
        follow(run)
        return PruneReport.read(run.out)


def lead(job: Job, ranks: Ranks, progress: Progress) -> PruneReport:
    """What the first process does, which is mostly the only one."""
    clock = Clock()
    with clock("total"):
        with clock("prepare"):
            run = spread_over(ranks.in_turn(lambda: prepare(job, progress)), ranks)
            report = new_report(run)
            report.baseline_memory = resident_memory()
        with workplace(run, progress) as journal:
            with clock("prepare"):
                journal.agree({"the model's weights": check_weights(run, progress)})
            with clock("own_text") if run.own_windows else nullcontext():
                run = with_own_text(run, progress)
                report.calibration |= {"own_sha256": run.own.provenance.sha256 if run.own else ""}
                journal.agree({"the model's own text": report.calibration["own_sha256"][:12]})
            with clock("dense_evaluation"):
                journal.dense = journal.dense or measure(run, run.source.folder, "dense perplexity", progress)
            with clock("prune"):
                clock.add(journal.seconds)
                ranks.meet()
                blocks = partial(prune_blocks, run, journal, report, clock, progress)
                with_room(blocks, windows_of(run), progress, ranks)
            with clock("verify"):
                verify_written(run, report, progress)
            with clock("pruned_evaluation"):
                pruned = measure(run, run.unfinished, "pruned perplexity", progress)
            add_evaluation(run, report, journal.dense, pruned)
            report.seconds = dict(clock.seconds)
            report.processes = ranks.facts(run.tokens)
            write_companions(run, report)
            replace_folder(run.unfinished, run.out)
    finish_report(run, report, clock)
    ranks.part()
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
        "efforts": {name: seconds(replace(task, recipe=job.at(name).recipe), rate) for name in EFFORTS},
    }


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
        first, pattern = len(report.layers), patterns[block.index]
        for group in stream.groups(block):
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
    report.coverage = coverage(run.plan.without(stream.uncalled, "weight used without a call"))


def describe(
    group: Group,
    pattern: SparsityPattern | None,
    solutions: list[LayerSolution],
    stored: list[Tensor],
    errors: list[float],
) -> list[LayerReport]:
    """Report the layers of a group, with the errors of their weights as they are stored."""
    stats = group.problem.stats
    spectrum = input_spectrum(stats.gram)
    found = zip(group.refs, group.problem.layers, solutions, stored, errors, strict=True)
    return [
        LayerReport(
            name=problem.name,
            shape=ref.shape,
            pattern=pattern.name if pattern else "",
            pruned=int((~solution.mask).sum()),
            kept_zeros=int(((weight == 0) & solution.mask).sum()),
            error=error,
            status=solution.status.value,
            tokens=stats.tokens,
            stats=solution.stats | (spectrum.figures(solution.stats.get("ridge")) if spectrum else {}),
        )
        for ref, problem, solution, weight, error in found
    ]


class Clock:
    """Adds up wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._since[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - self._since.pop(stage)

    def so_far(self) -> dict[str, float]:
        """Of all stages, also those that are not over."""
        now = time.perf_counter()
        return {**self.seconds, **{key: self.seconds[key] + now - since for key, since in self._since.items()}}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was spent before."""
        for stage, spent in seconds.items():
            self.seconds[stage] += spent


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

    return with_room(attempt, min(max(BATCH_TOKENS // length, 1), samples), progress)


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


def new_report(run: Prepared) -> PruneReport:
    """A report with all that is known before the run."""
    job, plan, versions = run.job, run.plan, run.versions
    config = run.source.config
    return PruneReport(
        llmprune=versions.pop("llmprune"),
        command=job.command,
        versions=versions,
        model={
            "name": job.model,
            "revision": run.source.revision,
            "type": config.model_type,
            "class": type(run.skeleton.model).__name__,
            "parameters": plan.parameters,
            "blocks": len(run.skeleton.blocks),
        },
        sparsity={
            "pattern": run.goal.name,
            "meaning": run.goal.describe(),
            "scope": run.goal.scope,
            "fraction": float(run.pattern.fraction) if run.pattern else 0.0,
            "note": run.goal.speed_note(),
            "done": list(run.structure.said) if run.structure else [],
            "config": run.structure.changes if run.structure else {},
        },
        method={"name": run.recipe.label, "options": run.options},
        recipe={"effort": job.effort if job.method == AUTO else None, **asdict(run.recipe)},
        calibration={**asdict(run.calibration.provenance), "tokens": math.prod(run.shape), "own": run.own_windows},
        evaluation=None,
        coverage=coverage(plan),
        machine={
            "device": str(run.skeleton.device),
            "compute": str(run.skeleton.compute).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        out=str(run.out),
    )


def coverage(plan: Plan) -> dict[str, Any]:
    """How much of the blocks is pruned, and what is not."""
    return {
        "block_parameters": plan.block_parameters,
        "covered": plan.covered,
        "fraction": plan.coverage,
        "skipped": plan.skipped_by_reason(),
    }


def add_evaluation(run: Prepared, report: PruneReport, dense: Perplexity | None, pruned: Perplexity | None) -> None:
    """Put the perplexities into the report, with what the user must know about them."""
    if dense is None or pruned is None or run.evaluation is None:
        return
    report.evaluation = {**asdict(run.evaluation.provenance), "dense": asdict(dense), "pruned": asdict(pruned)}
    report.evaluation["overlap"] = run.overlap
    if run.overlap:
        report.warnings.append(
            f"{run.overlap:.1%} of the evaluation text also stands in the calibration text, which flatters the result; "
            "evaluate on other text (--eval)"
        )
    if pruned.value > EXPLODED * dense.value:
        report.warnings.append(explosion(run, dense, pruned))


def explosion(run: Prepared, dense: Perplexity, pruned: Perplexity) -> str:
    """What happened, and what to try."""
    tries = [] if run.job.method == AUTO else [f"--effort {DEFAULT_EFFORT} without --method"]
    tries += ["--effort best"] if run.recipe.refine == 0 else []
    tries += [
        "more calibration data (--samples, --seq-len)",
        "calibration text closer to the use (--calib)",
        "less sparsity",
    ]
    return (
        f"the perplexity rose from {dense.value:.1f} to {pruned.value:.1f}: this model is hardly usable; "
        f"try {', '.join(tries)}"
    )


def write_companions(run: Prepared, report: PruneReport) -> None:
    """Everything in the folder besides the weights."""
    copy_companions(run.source.folder, run.unfinished)
    config = json.loads((run.source.folder / "config.json").read_text(encoding="utf-8"))
    for leftover in ("quantization_config", "compression_config", "sparsity_config"):
        config.pop(leftover, None)
    if run.structure:
        # A config may say a number under another name, which must not contradict it.
        aliases = {old for old, new in run.config.attribute_map.items() if new in run.structure.changes}
        config = {key: value for key, value in config.items() if key not in aliases} | run.structure.changes
    if run.job.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = run.job.dtype
    write_json(run.unfinished / "config.json", config)
    report.size = {
        "dense": run.skeleton.checkpoint.folder.nbytes,
        "pruned": sum(path.stat().st_size for path in run.unfinished.glob("*.safetensors")),
    }
    (run.unfinished / "README.md").write_text(model_card(report, run.source.folder), encoding="utf-8")
    write_report(report, run.unfinished)


def highest(report: PruneReport) -> int:
    """Largest resident size so far, in bytes; Linux adds its counters up in its own time and may tell less later."""
    return max(peak_memory(), report.baseline_memory, *(block.peak_memory for block in report.blocks))


def finish_report(run: Prepared, report: PruneReport, clock: Clock) -> None:
    """The figures that are only known at the end."""
    report.peak_memory = highest(report)
    if run.skeleton.device.type == "cuda":
        report.machine["device_memory"] = torch.cuda.max_memory_allocated(run.skeleton.device)
    report.seconds = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    write_report(report, run.out)
