"""What a run tells of itself: the report from its first line to its last, and what lies beside the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llmprune.model.selection import Plan
from llmprune.model.writer import copy_companions, write_json
from llmprune.pipeline.context import Prepared
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import LayerSolution
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT
from llmprune.pruning.spectrum import input_spectrum
from llmprune.reporting.html_report import write_report
from llmprune.reporting.model_card import model_card
from llmprune.reporting.report import LayerReport, PruneReport
from llmprune.runtime.memory import peak_memory
from llmprune.streaming.block import Group
from llmprune.streaming.perplexity import Perplexity

EXPLODED = 10.0


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
            "meaning": run.goal.describe(run.recipe.allocate != "uniform"),
            "scope": run.goal.scope,
            "fraction": float(run.pattern.fraction) if run.pattern else 0.0,
            "note": run.goal.speed_note(),
            "done": list(run.structure.said) if run.structure else [],
            "config": run.structure.changes if run.structure else {},
        },
        method={"name": run.recipe.label, "options": run.options},
        recipe={"effort": job.effective_effort, **asdict(run.recipe)},
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
        warnings=[run.left_out] if run.left_out else [],
    )


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


def coverage(plan: Plan) -> dict[str, Any]:
    """How much of the blocks is pruned, and what is not."""
    return {
        "block_parameters": plan.block_parameters,
        "covered": plan.covered,
        "fraction": plan.coverage,
        "skipped": plan.skipped_by_reason(),
    }


def add_own_text(run: Prepared, report: PruneReport) -> dict[str, str]:
    """Put the hash of what the model wrote into the report; returns it as something that the result depends on."""
    assert run.own is not None
    report.calibration["own_sha256"] = digest = run.own.provenance.sha256
    return {"the model's own text": digest[:12]}


def steps_left_out(report: PruneReport) -> list[str]:
    """That steps of refinement were left out, if some were."""
    blocks = [refinement for refinement in report.refinements if refinement.left_out]
    if not blocks:
        return []
    return [
        f"{sum(refinement.left_out for refinement in blocks)} steps of refinement were left out in {len(blocks)} of "
        f"{len(report.refinements)} blocks: gradients were not finite in {report.machine['compute']}"
    ]


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


def finish_report(run: Prepared, report: PruneReport, seconds: Mapping[str, float]) -> None:
    """The figures that are only known at the end."""
    report.peak_memory = highest(report)
    if run.skeleton.device.type == "cuda":
        report.machine["device_memory"] = torch.cuda.max_memory_allocated(run.skeleton.device)
    report.seconds = {stage: round(spent, 3) for stage, spent in seconds.items()}
    write_report(report, run.out)


def processes(run: Prepared) -> dict[str, Any]:
    """How many processes took part, and the tokens and rows of every one; nothing where there is one."""
    if run.group.is_single:
        return {}
    size = run.group.world_size
    tokens = [run.tokens[rank::size].numel() for rank in range(size)]
    return {"size": size, "tokens": tokens, "rows": list(run.sharding.rows)}
