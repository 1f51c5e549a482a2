"""Prepares a run: every check of a job, before the first expensive step and with nothing written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.job import DEFAULT_CONTEXT, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, Job
from llmprune.model.selection import Plan, make_plan
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.context import Data, RunContext
from llmprune.pipeline.output import free_space, output_folder
from llmprune.pipeline.quantized_form import fitted_grid, saved_bytes
from llmprune.pipeline.resolve import resolve
from llmprune.pipeline.workdir import check_finished
from llmprune.progress import Progress
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.sparsity import Sparsity
from llmprune.reporting.report import FILE as REPORT
from llmprune.reporting.report import PruneReport
from llmprune.runtime.device import pick_device
from llmprune.runtime.foreign import read_json, user_path
from llmprune.runtime.process_group import SINGLE, ProcessGroup
from llmprune.sources.demo import default_cache
from llmprune.sources.generated import generation_batch_size
from llmprune.sources.models import DEQUANTIZED, Source, load_tokenizer, open_source
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import TokenBatch, calibration_tokens, evaluation_tokens, load_tokens, shared_runs
from llmprune.streaming.block_gap import check_separate
from llmprune.streaming.block_reconstruction import LEAST_WINDOWS
from llmprune.streaming.block_types import all_block_types, all_couplings, block_runs
from llmprune.structure.cut import Structure, check_channel_scales, unchanged
from llmprune.structure.plan import BlockCouplings, plan_structure
from llmprune.structure.written_config import check_written

MOST_THREADS = 1024  # far more make the thread library end the process


def prepare(job: Job, progress: Progress, group: ProcessGroup = SINGLE, *, headers_only: bool = False) -> RunContext:
    """The context of a run; rank 0 checks the job before the others, which then find its downloads in the cache.

    Args:
        job: what the user asked for.
        progress: told what is done.
        group: the processes.
        headers_only: whether only the form of the model counts, so that weights on the Hub need not be fetched.

    Raises:
        InputError: with what to do about it.
    """
    run = group.main_process_first(lambda: check_job(job, progress, group, headers_only))
    windows = run.shape[0]
    if windows < group.world_size:
        refused = InputError(
            f"{group.world_size} processes cannot share {windows} calibration windows",
            "more --samples, or fewer processes",
        )
        refused.silent = not group.is_main
        raise refused
    # Whether memory suffices to generate text is for rank 0 to say: the others may have more, or less.
    ratio = group.broadcast_object(run.recipe.self_calibration)
    return replace(run, procedure=replace(run.procedure, recipe=replace(run.recipe, self_calibration=ratio)))


def check_job(job: Job, progress: Progress, group: ProcessGroup = SINGLE, headers_only: bool = False) -> RunContext:
    """Check a job, cheap things first; arguments as of `prepare`.

    Raises:
        InputError: with what to do about it.
    """
    procedure = resolve(job, group)
    sparsity, recipe, solver = procedure.sparsity, procedure.recipe, procedure.solver
    cache = user_path(job.cache_dir or default_cache())
    out = output_folder(job, sparsity)
    device = pick_device(job.device)
    set_threads(job.threads)
    source = open_source(
        job.model,
        revision=job.revision,
        cache=cache,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
        headers_only=headers_only,
    )
    _refuse_integers(source)
    if source.folder.resolve() == out.resolve():
        raise InputError(f"--out {out} is the model itself", "choose another folder")
    _check_positions(source, job)
    dtype = getattr(torch, job.dtype) if job.dtype else None
    skeleton = Skeleton(
        source.config,
        source.weights(dtype),
        dtype=dtype,
        compute=_compute_dtype(source, device),
        device=device,
        trust_remote_code=job.trust_remote_code,
    )
    if source.quantization:
        kind = str(dtype or DEQUANTIZED).removeprefix("torch.")
        progress.note(f"the weights are stored as {source.quantization.form}; they are dequantised to {kind} as read")
    plan = make_plan(skeleton, sparsity.pattern, job.only, job.skip)
    for text in plan.notes:
        progress.note(text)
    any_tokens = torch.arange(64)[None] % source.config.get_text_config().vocab_size
    structure = unchanged(skeleton)
    if sparsity.removals:
        structure = _smaller(job, source, skeleton, sparsity, any_tokens)
        all_layers = sparsity.pattern is not None or procedure.grid is not None or sparsity.blocks is not None
        sliced = None if all_layers else structure.sliced_layers(skeleton)
        # Which blocks go is not known yet: the plan is of all of them, and bytes are those of as many.
        whole = structure.whole or structure
        plan = plan.smaller(sliced, structure.saved(skeleton)).resized(whole.shapes(skeleton))
        for text in structure.summary:
            progress.note(text)
    if procedure.grid is not None:
        grid = fitted_grid(procedure.grid, skeleton, plan, structure.whole or structure)
        procedure = replace(procedure, grid=grid)
        left = plan if structure.kept_blocks is None else plan.within(skeleton, structure.kept_blocks)
        plan = replace(plan, out_bytes=plan.out_bytes - saved_bytes(grid, skeleton, left, structure))
    if "channel_scale" in solver.needs:
        check_channel_scales(skeleton, structure)
    if "norm_scale" in solver.needs:
        _check_norm_scales(skeleton, plan, any_tokens)
    data = _data(job, source, cache, progress)
    recipe, left_out = without_generation_if_too_large(recipe, job, skeleton, data.calibration.tokens.shape[1])
    for warning in filter(None, (left_out, data.warning)):
        progress.warn(warning)
    check_reconstruction(recipe, data.calibration)
    procedure = replace(procedure, recipe=recipe)
    run = RunContext(job, source, procedure, skeleton, plan, structure, data, out, left_out, _held(source, sparsity))
    check_finished(run)
    _check_space(run)
    return run


def _smaller(job: Job, source: Source, skeleton: Skeleton, sparsity: Sparsity, tokens: Tensor) -> Structure:
    """The structure after the removal of blocks, channels, heads and experts.

    Args:
        job: what the user asked for.
        source: of the model.
        skeleton: the model.
        sparsity: with removals.
        tokens: any, `(1, length)`, of which a few are run.

    Raises:
        InputError: the model, its config or its file does not allow it.
    """
    if sparsity.blocks is not None:
        check_separate(skeleton, tokens)
    couplings = all_couplings(skeleton, tokens) if sparsity.narrows else BlockCouplings()
    runs = block_runs(skeleton, tokens)
    structure = plan_structure(
        skeleton, sparsity.removals, couplings, runs, job.round_to, sparsity.pattern, job.trust_remote_code
    )
    check_written(structure, read_json(source.folder / "config.json"))
    return structure


def _held(source: Source, sparsity: Sparsity) -> PruneReport | None:
    """The report of a source that was pruned before, where nothing more is pruned."""
    if sparsity or not (source.folder / REPORT).exists():
        return None
    return PruneReport.read(source.folder)


def _refuse_integers(source: Source) -> None:
    """Refuse a source whose weights were rounded to few bits: they are read, but the original weights are lost."""
    if source.quantization and source.quantization.bits:
        raise InputError(
            f"{source.name} is already quantised ({source.quantization.form})",
            "prune the original model, which its card names as base_model, with --quantize",
        )


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if one is asked for."""
    if threads is None:
        return
    if threads > MOST_THREADS:
        raise InputError(f"--threads {threads} is more than {MOST_THREADS}", "no more than there are CPU cores")
    torch.set_num_threads(threads)


def _check_norm_scales(skeleton: Skeleton, plan: Plan, tokens: Tensor) -> None:
    """Refuse layers that no norm feeds."""
    types = all_block_types(skeleton, tokens)
    fed = {
        f"{skeleton.block_name(index)}.{local}"
        for index in range(len(skeleton.blocks))
        for local in types.norm_scales(index)
    }
    unfed = [layer.name for layer in plan.layers if layer.name not in fed]
    if unfed:
        flags = dict.fromkeys(f"--skip '*.{name.rpartition('.')[2]}'" for name in unfed)
        raise InputError(
            f"no norm feeds {unfed[0]!r}, so its inputs have no learned scale",
            f"leave such layers out: {' '.join(flags)}",
        )


def without_generation_if_too_large(recipe: Recipe, job: Job, skeleton: Skeleton, length: int) -> tuple[Recipe, str]:
    """The recipe without self-generated text where memory does not suffice, and why; refused if it was asked for."""
    try:
        if recipe.self_calibration:
            generation_batch_size(skeleton, length)
    except InputError as error:
        if job.self_calibration:
            raise
        return replace(recipe, self_calibration=0.0), f"{job.effort} goes without self-generated text: {error}"
    return recipe, ""


def check_reconstruction(recipe: Recipe, calibration: TokenBatch) -> None:
    """Refuse a single window where blocks are reconstructed: they are validated on batches held out of training."""
    windows = len(calibration.tokens)
    if recipe.reconstruct and windows < LEAST_WINDOWS:
        raise InputError(
            f"block-wise reconstruction holds out calibration windows: it needs {LEAST_WINDOWS}, there is {windows}",
            "use more windows (--samples), or leave it out (--reconstruct 0)",
        )


def _check_space(run: RunContext) -> None:
    """Refuse an output that cannot be written, or does not fit beside the hidden states on their way to it."""
    parent, free = free_space(run.out)
    there = sum(path.stat().st_size for path in run.workdir.rglob("*") if path.is_file())
    # While shards are joined, one file is there twice.
    joined = max(min(run.job.max_shard_size, run.plan.out_bytes), _expert_bytes(run))
    needed = run.plan.out_bytes + joined + run.hidden_bytes + 32 * 2**20 - there
    if free < needed:
        raise InputError(
            f"{run.out} needs {needed / 2**20:,.0f} MiB, but {parent} has {free / 2**20:,.0f} MiB free",
            "free disk space, choose another --out, or store in fewer bytes with --dtype bfloat16",
        )


def _expert_bytes(run: RunContext) -> int:
    """Bytes of the files with pruned experts and narrower ones, where those of a block exceed the memory for them."""
    if run.recipe.whole_blocks:
        return 0
    skeleton, smaller = run.skeleton, run.structure.shapes(run.skeleton)
    blocks = (skeleton.sliced(skeleton.block_parameters(index)) for index in range(len(skeleton.blocks)))
    sizes = (
        sum(
            (slices.shape.numel() + (math.prod(smaller[name]) if name in smaller else 0))
            * skeleton.checkpoint.stored_dtype(name).itemsize
            for name, slices in block.items()
        )
        for block in blocks
    )
    return run.group.world_size * max(sizes, default=0)


def _check_positions(source: Source, job: Job) -> None:
    limit = positions(source)
    asked = {"--seq-len": job.seq_len or 0, "--eval-context": (job.eval_context or 0) if job.evaluate else 0}
    for flag, value in asked.items():
        if value > limit:
            raise InputError(
                f"{flag} {value} exceeds the model's {limit} positions{_why_no_further(source)}",
                f"use {flag} {limit} or less",
            )


def _why_no_further(source: Source) -> str:
    """Why a model that takes longer texts than it has positions is not calibrated on them, or ''."""
    rope = getattr(source.config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "dynamic":
        return ""
    return (
        "; beyond them its rotary frequencies change with the length of the text (dynamic NTK), so statistics of one "
        "length would not be those of another"
    )


def positions(source: Source) -> int:
    """The longest text the model can take, in tokens."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def _data(job: Job, source: Source, cache: Path, progress: Progress) -> Data:
    """The calibration and evaluation tokens."""
    text = source.config.get_text_config()
    calib = user_path(job.calibration_source)
    frozen = calib.suffix == ".safetensors"
    reader = None
    if not frozen or job.evaluate:
        reader = Reader(load_tokenizer(source, job.trust_remote_code), cache, progress, job.bos)
    if frozen:
        calibration = load_tokens(calib, job.samples, job.seq_len, text.vocab_size)
    else:
        assert reader is not None
        calibration = calibration_tokens(
            job.calibration_source,
            reader,
            samples=job.samples or DEFAULT_SAMPLES,
            seq_len=job.seq_len or min(DEFAULT_SEQ_LEN, positions(source)),
            seed=job.seed,
        )
    evaluation = None
    if job.evaluate:
        assert reader is not None
        evaluation = evaluation_tokens(
            job.evaluation_source,
            reader,
            windows=job.eval_windows,
            context=job.eval_context or min(DEFAULT_CONTEXT, positions(source)),
        )
    for batch in filter(None, (calibration, evaluation)):
        if (largest := int(batch.tokens.max())) >= text.vocab_size:
            raise InputError(
                f"the tokenizer gives id {largest}, the model's vocabulary ends at {text.vocab_size - 1}",
                "the tokenizer does not belong to this model",
            )
    overlap = shared_runs(calibration.text, evaluation.text) if evaluation else 0.0
    return Data(calibration, evaluation, overlap)


def _compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    """The dtype of forwards: float32 on the CPU; on an accelerator the config's."""
    own = source.config.dtype or source.config.get_text_config().dtype
    if device.type == "cpu" or own not in {torch.float16, torch.bfloat16}:
        return torch.float32
    assert isinstance(own, torch.dtype)
    return own
