"""What a distillation writes: weights under the names, shapes and types of the pruned folder, and files beside them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.distill_job import DistillJob
from llmprune.knobs import knobs_of
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.writer import ShardWriter
from llmprune.pipeline.distill.context import DistillContext
from llmprune.pipeline.distill.state import fingerprint_of
from llmprune.reporting.html_report import PAGE, write_report
from llmprune.reporting.model_card import FILE as CARD
from llmprune.reporting.model_card import model_card
from llmprune.reporting.report import FILE, PruneReport
from llmprune.runtime.files import write_text
from llmprune.runtime.memory import peak_memory
from llmprune.runtime.ownership import delete, regular_files
from llmprune.runtime.redact import base_name, redacted_command
from llmprune.sources.tokens import TokenBatch, shared_runs, token_batch
from llmprune.streaming.perplexity import Perplexity
from llmprune.training.trainer import OPTIMIZER, SCHEDULE, WARM_UP, Outcome

PLACES = ("teacher", "out", "calib", "eval_text", "cache_dir")
"""Settings that name a place on this machine, or a data set."""


def write_weights(run: DistillContext, trained: Iterable[tuple[str, Tensor]]) -> None:
    """Write the weights of a student, in files as large as those of the pruned folder.

    Args:
        run: the job.
        trained: names on disk and tensors; all others are copied.
    """
    raw, new = SafetensorsFolder(run.folder), dict(trained)
    sizes: dict[Path, int] = defaultdict(int)
    for entry in raw.entries.values():
        sizes[entry.file] += entry.nbytes
    if run.unfinished.exists():
        delete(run.unfinished)
    run.unfinished.mkdir()
    writer = ShardWriter(run.unfinished, max(sizes.values()))
    writer.write((name, new.pop(name) if name in new else raw[name]) for name in raw)
    for replaced in writer.join():
        for file in replaced:
            delete(run.unfinished / file)
    writer.seal()


def write_companions(run: DistillContext, report: PruneReport) -> None:
    """Everything in the folder besides the weights: the pruned folder's files, card and report."""
    weights = {entry.file for entry in SafetensorsFolder(run.folder).entries.values()}
    regular, _ = regular_files(run.folder)
    for path in regular:
        local = path.relative_to(run.folder)
        if path in weights or local.name.endswith(".safetensors.index.json") or local.as_posix() in {FILE, PAGE, CARD}:
            continue
        (run.unfinished / local).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, run.unfinished / local)
    write_text(run.unfinished / CARD, model_card(report, run.folder))
    written, _ = regular_files(run.unfinished)
    report.files = sorted({FILE, PAGE, *(path.relative_to(run.unfinished).as_posix() for path in written)})
    write_report(report, run.unfinished)


def distillation_facts(
    run: DistillContext,
    windows: Tensor,
    generated: TokenBatch | None,
    outcome: Outcome,
    perplexities: tuple[Perplexity | None, Perplexity | None],
) -> dict[str, Any]:
    """The report's section about the distillation.

    Args:
        run: the job.
        windows: all that was trained on.
        generated: windows that the teacher generated.
        outcome: of the training.
        perplexities: before and after; None where they were not measured.
    """
    job, revision = run.job, run.source.revision
    trained = sum(size for name, size in run.student.sizes().items() if name not in run.frozen)
    places = set(PLACES) - ({"teacher"} if revision else set())
    flags = {each.flag for each in knobs_of(DistillJob) if each.name in places}
    return {
        "command": redacted_command(job.command, flags),
        "teacher": run.source.name if revision else base_name(run.source.name),
        "teacher_revision": revision,
        "text": asdict(run.data.calibration.provenance),
        "tokens": windows.numel(),
        "sha256": token_batch(windows, "", None).provenance.sha256,
        "generated": len(generated.tokens) if generated else 0,
        "generated_sha256": generated.provenance.sha256 if generated else "",
        "held_out": len(run.held_out.tokens),
        "held_out_sha256": run.held_out.provenance.sha256,
        "epochs": job.epochs,
        "steps": run.steps,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "schedule": f"{SCHEDULE}, warm-up in {WARM_UP:.0%} of the steps",
        "optimizer": OPTIMIZER,
        "temperature": job.temperature,
        "mix": job.mix,
        "top_k": run.top_k,
        "trained_parameters": trained,
        "frozen": list(job.freeze),
        "precision": str(run.precision).removeprefix("torch."),
        "gradient_checkpointing": job.gradient_checkpointing,
        "divergences": [{"step": step, "divergence": value} for step, value in sorted(outcome.divergences.items())],
        "kept_step": outcome.kept,
        "divergence_before": outcome.divergences[0],
        "divergence_after": outcome.divergences[outcome.kept],
        "evaluation": _evaluation(run, windows, perplexities),
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "processes": run.group.world_size,
        "peak_memory": peak_memory(),
        "fingerprint": fingerprint_of(run),
    }


def _evaluation(
    run: DistillContext, windows: Tensor, perplexities: tuple[Perplexity | None, Perplexity | None]
) -> dict[str, Any] | None:
    """The perplexities, and the text they were measured on."""
    before, after = perplexities
    if before is None or after is None or run.data.evaluation is None:
        return None
    batch = run.data.evaluation
    overlap = shared_runs(windows[:, run.data.calibration.bos_tokens :], batch.text)
    return {**asdict(batch.provenance), "before": asdict(before), "after": asdict(after), "overlap": overlap}
