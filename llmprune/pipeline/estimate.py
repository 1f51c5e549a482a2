"""The plan of a run, with estimates of its time and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmprune.job import Job
from llmprune.model.selection import Plan
from llmprune.pipeline.block_choice import NOTHING_TO_FIT
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.estimate_memory import blocks_by_expert, memory
from llmprune.pipeline.estimate_time import product_rate, seconds
from llmprune.pipeline.prepare import prepare, without_generation_if_too_large
from llmprune.pipeline.report_builder import coverage, initial_report
from llmprune.pipeline.resolve import applicable
from llmprune.pipeline.size_choice import counted
from llmprune.pipeline.task import Task, adding
from llmprune.progress import Progress
from llmprune.pruning.recipe import EFFORTS
from llmprune.pruning.sparsity import parse_sparsity

REPORTED = ("model", "sparsity", "quantization", "method", "recipe", "coverage", "calibration", "out")
"""What a plan says as a report does."""


def dry_run(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """The plan of a run: layers, sizes, and an estimate of its time and memory; nothing is written.

    Raises:
        InputError: the job cannot be done.
    """
    progress = progress or Progress()
    job = counted(job, progress)
    run = prepare(job, progress, headers_only=True)
    report = initial_report(run).to_json()
    text, evaluation = run.data.calibration.tokens, run.data.evaluation
    evaluated = evaluation.tokens.numel() if evaluation else 0
    rate, budget = product_rate(), run.job.activation_memory
    plan, removed = _left(run), len(run.removed_blocks)
    task = Task(run.skeleton, plan, run.recipe, text.numel(), text.shape[1], evaluated, budget, run.grid, removed)
    return {
        **{key: report[key] for key in REPORTED},
        "coverage": coverage(plan),
        "layers": [{"name": layer.name, "shape": layer.shape} for layer in plan.layers],
        "size": {"dense": run.skeleton.checkpoint.folder.nbytes, "pruned": run.plan.out_bytes},
        "estimate": {
            "seconds": seconds(task, rate),
            "memory": memory(task),
            "blocks_by_expert": blocks_by_expert(task),
        },
        "efforts": {name: seconds(at_effort(task, job.at(name)), rate) for name in EFFORTS},
    }


def _left(run: RunContext) -> Plan:
    """The plan without the blocks that are removed: which ones go is not known yet, so it is without the last ones."""
    kept = run.structure.kept_blocks
    if kept is None:
        return run.plan
    plan = run.plan.within(run.skeleton, kept)
    if run.pattern is not None or run.grid is not None:
        return plan
    fitted = frozenset(layer.name for layer in adding(plan, run.skeleton.width) if run.recipe.compensate)
    return plan.smaller(fitted | run.structure.sliced_layers(run.skeleton), 0, NOTHING_TO_FIT)


def at_effort(task: Task, job: Job) -> Task:
    """The same task with the recipe of another effort, as it would be run here."""
    recipe = applicable(job.recipe, job, parse_sparsity(job.sparsity))
    recipe, _ = without_generation_if_too_large(recipe, job, task.skeleton, task.seq_len)
    return replace(task, recipe=recipe)
