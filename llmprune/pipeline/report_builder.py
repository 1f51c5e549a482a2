"""Builds the report of a run, from its first line to its last."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmprune.job import knobs
from llmprune.knobs import flag_of
from llmprune.model.auto_class import auto_class
from llmprune.model.compressed_tensors import format_of
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.model.tower import tower_name
from llmprune.pipeline.companions import write_companions
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.size_options import block_sizes
from llmprune.pipeline.timing import Clock
from llmprune.pruning.grid import Grid
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import InputStats, LayerSolution
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT
from llmprune.pruning.spectrum import input_spectrum
from llmprune.reporting.report import BlockReconstruction, BlockReport, LayerReport, MixtureReport, PruneReport
from llmprune.runtime.memory import peak_memory, resident_memory
from llmprune.runtime.redact import base_name, redacted_command
from llmprune.sources.tokens import TokenBatch
from llmprune.streaming.batch_shards import BatchSharding
from llmprune.streaming.block import Block
from llmprune.streaming.perplexity import Perplexity
from llmprune.streaming.schedule import Group

PATHS = frozenset({"out", "calib", "eval_text", "cache_dir"})
"""Fields of a job that name a place on this machine, or a data set; `model` does so unless it is on the Hub."""
EXPLODED = 10.0
"""A perplexity that is so many times the dense model's is warned of."""


class ReportBuilder:
    """Collects the report of a run.

    Args:
        run: the job.
        clock: the wall time of its stages.
    """

    def __init__(self, run: RunContext, clock: Clock) -> None:
        self.run, self.clock = run, clock
        self.report = initial_report(run)
        self.report.baseline_memory = resident_memory()
        self._since, self._first = time.perf_counter(), 0
        self._routed: list[int] = []
        held = run.held.layers if run.held else []
        self._held = {layer.name: layer.pattern for layer in held}

    def add_generated(self, generated: TokenBatch | None) -> dict[str, str]:
        """Note the hash of the self-generated windows; returns it as part of the run's fingerprint."""
        if generated is None:
            return {}
        self.report.calibration["self_generated_sha256"] = digest = generated.provenance.sha256
        return {"the self-generated text": digest[:12]}

    def update(self, run: RunContext) -> None:
        """The blocks to be removed are chosen."""
        self.run = run
        self.report.sparsity, self.report.coverage = sparsity_facts(run), coverage(run.plan)
        self.report.model["parameters_left"] = parameters_left(run)

    def add_mixtures(self, mixtures: Sequence[MixtureReport]) -> None:
        """Add the mixtures of a block that lost experts."""
        self.report.mixtures += [replace(item, block=self.run.renumbered(item.block)) for item in mixtures]

    def add_reconstructions(self, reconstructions: Sequence[BlockReconstruction]) -> None:
        """Add the reconstruction of a block."""
        self.report.reconstructions += [
            replace(item, block=self.run.renumbered(item.block)) for item in reconstructions
        ]

    def start_blocks(self) -> None:
        """The first block begins."""
        self._since, self._first = time.perf_counter(), len(self.report.layers)

    def add_group(
        self,
        group: Group,
        pattern: SparsityPattern | None,
        solutions: Sequence[LayerSolution],
        stored: Sequence[Tensor],
        errors: Sequence[float],
    ) -> None:
        """Add the layers of a group, with the errors of their weights as stored."""
        found = layer_reports(group, pattern, solutions, stored, errors)
        found = [replace(layer, name=self.run.renumbered(layer.name)) for layer in found]
        if self._held:
            found = [replace(layer, pattern=self._held.get(layer.name, "")) for layer in found]
        self.report.layers += found
        self._routed += [layer.tokens for layer, ref in zip(found, group.refs, strict=True) if ref.expert]

    def add_block(self, block: Block) -> None:
        """Add what a block took, since the one before."""
        now = time.perf_counter()
        spread = [min(self._routed), round(median(self._routed)), max(self._routed)] if self._routed else []
        self.report.blocks.append(
            BlockReport(
                self.run.renumbered(block.name),
                round(now - self._since, 3),
                self.peak_memory(),
                resident_memory(),
                spread,
            )
        )
        self._routed = []
        self.report.seconds = self.clock.so_far()
        self._since = now

    def mean_block_error(self) -> float:
        """Mean relative error of the layers since the last call; without such, of the last mixture."""
        errors = [layer.error for layer in self.report.layers[self._first :]]
        errors = errors or [mixture.error for mixture in self.report.mixtures[-1:]]
        self._first = len(self.report.layers)
        return sum(errors) / max(len(errors), 1)

    def finish_blocks(self, immovable: Sequence[str], dense: Mapping[str, str]) -> None:
        """The last block is done.

        Args:
            immovable: why channels of some blocks could not be permuted.
            dense: layers that stayed dense though they were chosen, by full name, and why.
        """
        self.report.warnings += [*immovable, *skipped_steps(self.report)]
        self.report.coverage = coverage(self.run.plan.without(dense))

    def add_evaluation(self, dense: Perplexity | None, pruned: Perplexity | None) -> None:
        """Add the perplexities, and warnings about them."""
        run, report = self.run, self.report
        if dense is None or pruned is None or run.data.evaluation is None:
            return
        provenance, overlap = asdict(run.data.evaluation.provenance), run.data.overlap
        report.evaluation = {**provenance, "dense": asdict(dense), "pruned": asdict(pruned), "overlap": overlap}
        if overlap:
            report.warnings.append(
                f"{overlap:.1%} of the evaluation text also stands in the calibration text, which flatters the "
                "result; evaluate on other text (--eval)"
            )
        if pruned.value > EXPLODED * dense.value:
            report.warnings.append(explosion(run, dense, pruned))

    def write(self, windows: Tensor) -> PruneReport:
        """Write all files of the folder beside the weights; returns the report.

        Args:
            windows: all calibration windows, `(windows, length)`.
        """
        run, report = self.run, self.report
        report.processes = processes(run, windows)
        report.peak_memory = self.peak_memory()
        if run.skeleton.device.type == "cuda":
            report.machine["device_memory"] = torch.cuda.max_memory_allocated(run.skeleton.device)
        report.seconds = {stage: round(spent, 3) for stage, spent in self.clock.so_far().items()}
        write_companions(run, report)
        return report

    def peak_memory(self) -> int:
        """Largest resident size so far, in bytes; Linux sums its counters with a delay and may tell less later."""
        blocks = (block.peak_memory for block in self.report.blocks)
        return max(peak_memory(), self.report.baseline_memory, *blocks)


def initial_report(run: RunContext) -> PruneReport:
    """A report with all that is known before the run."""
    job, plan, versions, revision = run.job, run.plan, run.versions, run.source.revision
    config = run.source.config
    paths = PATHS if revision else PATHS | {"model"}
    return PruneReport(
        llmprune=versions.pop("llmprune"),
        command=redacted_command(job.command, flags_of(paths)),
        versions=versions,
        model={
            "name": job.model if revision else base_name(job.model),
            "revision": revision,
            "type": config.model_type,
            "class": type(run.skeleton.model).__name__,
            "parameters": plan.parameters,
            "parameters_left": parameters_left(run),
            "blocks": len(run.skeleton.blocks),
            "loader": auto_class(config),
            **quantization_facts(run),
            **wrapper_facts(run.skeleton),
        },
        sparsity=sparsity_facts(run),
        method={"name": run.recipe.label, "options": run.solver.options},
        recipe={"effort": job.effective_effort, **asdict(run.recipe)},
        calibration={
            **asdict(run.data.calibration.provenance),
            "tokens": math.prod(run.shape),
            "self_generated": run.generated_windows,
        },
        evaluation=None,
        coverage=coverage(plan),
        quantization=grid_facts(run.grid) if run.grid else {},
        distillation=run.held.distillation if run.held else {},
        machine={
            "device": str(run.skeleton.device),
            "compute": str(run.skeleton.compute).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        out=str(run.out),
        warnings=[*filter(None, (run.left_out, run.data.warning))],
    )


def parameters_left(run: RunContext) -> int:
    """The number of parameters of the model that is made."""
    return run.plan.parameters - run.structure.removed_parameters(run.skeleton)


def sparsity_facts(run: RunContext) -> dict[str, Any]:
    """What is pruned, or was before where nothing more is."""
    facts: dict[str, Any] = {
        "pattern": run.sparsity.name,
        "meaning": run.sparsity.describe(run.recipe.allocate != "uniform", run.structure.ratios),
        "scope": run.sparsity.scope,
        "fraction": float(run.pattern.sparsity) if run.pattern else 0.0,
        "note": run.sparsity.speed_note(),
        "removed": list(run.structure.summary),
        "config": run.structure.changes,
    }
    if run.job.asked:
        left = 1 - run.structure.removed_parameters(run.skeleton) / sum(block_sizes(run.skeleton))
        facts["asked"] = run.job.asked
        facts["removed"].insert(0, f"{run.job.asked}: {left:.1%} of the block parameters left")
    if run.held is not None:
        facts = dict(run.held.sparsity)
    return facts | {"note": "; ".join(filter(None, [facts["note"], run.grid.speed_note() if run.grid else ""]))}


def quantization_facts(run: RunContext) -> dict[str, str]:
    """How the source stores its weights, and the dtype they were dequantised to; empty where they are plain."""
    if run.source.quantization is None:
        return {}
    return {"stored_as": run.source.quantization.form, "dequantized_to": run.dequantized_dtype}


def grid_facts(grid: Grid) -> dict[str, Any]:
    """The grid of the written weights, and the format in which they are stored."""
    return {
        "grid": grid.name,
        "meaning": grid.describe(),
        "bits": grid.bits,
        "group_size": grid.group or None,
        "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        "format": f"compressed-tensors, {format_of(grid)}",
    }


def wrapper_facts(skeleton: Skeleton) -> dict[str, Any]:
    """The language tower of a wrapper, and what beside it stays as it was; empty where a model is nothing else."""
    if not skeleton.beside:
        return {}
    parts = [skeleton.model.get_submodule(part) for part in skeleton.beside]
    beside = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return {"tower": tower_name(skeleton.model), "beside": ", ".join(skeleton.beside), "parameters_beside": beside}


def flags_of(names: Collection[str]) -> set[str]:
    """The flags of fields of a job, by present and earlier names."""
    return {flag for each in knobs() if each.name in names for flag in (each.flag, *map(flag_of, each.earlier))}


def layer_reports(
    group: Group,
    pattern: SparsityPattern | None,
    solutions: Sequence[LayerSolution],
    stored: Sequence[Tensor],
    errors: Sequence[float],
) -> list[LayerReport]:
    """The reports of the layers of a group, with the errors of their weights as stored."""
    stats = group.problem.stats
    spectrum = input_spectrum(stats.gram)
    found = zip(group.refs, group.problem.layers, solutions, stored, errors, strict=True)
    return [
        LayerReport(
            name=problem.name,
            shape=ref.shape,
            pattern=pattern.name if pattern else "",
            pruned=int((~solution.mask).sum()),
            unpruned_zeros=int(((weight == 0) & solution.mask).sum()),
            error=error,
            status=solution.status.value,
            tokens=stats.tokens - stats.pooled,
            stats=solution.stats
            | _shrinkage(stats)
            | (spectrum.figures(solution.stats.get("damping_lambda")) if spectrum else {}),
            grid=solution.scales.grid.name if solution.scales else "",
        )
        for ref, problem, solution, weight, error in found
    ]


def _shrinkage(stats: InputStats) -> dict[str, float]:
    """The weight of the tokens of all experts in the statistics of one."""
    return {"shrinkage": stats.pooled / stats.tokens} if stats.pooled else {}


def coverage(plan: Plan) -> dict[str, Any]:
    """The fraction of the block parameters in pruned layers, and the reasons for the rest."""
    return {
        "block_parameters": plan.block_parameters,
        "covered": plan.covered,
        "fraction": plan.coverage,
        "skipped": plan.skipped_by_reason(),
    }


def skipped_steps(report: PruneReport) -> list[str]:
    """A warning that steps of block-wise reconstruction were left out, if some were."""
    blocks = [item for item in report.reconstructions if item.skipped_steps]
    if not blocks:
        return []
    return [
        f"{sum(item.skipped_steps for item in blocks)} optimizer steps were skipped in {len(blocks)} of "
        f"{len(report.reconstructions)} blocks: gradients were not finite in {report.machine['compute']}"
    ]


def explosion(run: RunContext, dense: Perplexity, pruned: Perplexity) -> str:
    """A warning that the pruned model is hardly usable, with what to try."""
    tries = [] if run.job.method == AUTO else [f"--effort {DEFAULT_EFFORT} without --method"]
    tries += ["--effort best"] if run.recipe.reconstruct == 0 else []
    tries += [
        "more calibration data (--samples, --seq-len)",
        "calibration text closer to the use (--calib)",
        "less sparsity",
    ]
    return (
        f"the perplexity rose from {dense.value:.1f} to {pruned.value:.1f}: this model is hardly usable; "
        f"try {', '.join(tries)}"
    )


def processes(run: RunContext, windows: Tensor) -> dict[str, Any]:
    """World size, and tokens and solved rows of every process; empty for a single process."""
    if run.group.is_single:
        return {}
    size = run.group.world_size
    own = [BatchSharding(len(windows), 1, rank, size).own for rank in range(size)]
    tokens = [windows[one].numel() for one in own]
    return {"world_size": size, "tokens": tokens, "rows": list(run.procedure.sharding.rows)}
