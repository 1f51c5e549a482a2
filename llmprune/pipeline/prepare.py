"""Everything that can go wrong is found here, before the first expensive step and with nothing written."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.job import Job
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.selection import Plan, make_plan
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.context import Prepared
from llmprune.pipeline.resolve import stages
from llmprune.progress import Progress
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.sparsity import Sparsity
from llmprune.reporting.report import FILE
from llmprune.runtime.device import pick_device
from llmprune.sources.demo import default_cache
from llmprune.sources.generated import check_room
from llmprune.sources.models import Source, load_tokenizer, open_source
from llmprune.sources.tokens import TokenBatch, calibration_tokens, evaluation_tokens, load_tokens, shared_runs
from llmprune.streaming.block_reconstruction import LEAST_SAMPLES
from llmprune.streaming.block_types import all_couplings, all_kinds
from llmprune.structure.cut import check_channel_scales
from llmprune.structure.plan import plan_structure

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_CONTEXT = 128, 512, 1024
MOST_THREADS = 1024  # far more make the thread library end the process


def prepare(job: Job, progress: Progress) -> Prepared:
    """Check a job, cheap things first.

    Raises:
        InputError: with what to do about it.
    """
    goal, recipe, solver, remover = stages(job)
    cache = job.cache_dir or default_cache()
    out = output_folder(job, goal)
    device = pick_device(job.device)
    if job.threads is not None:
        if job.threads > MOST_THREADS:
            raise InputError(f"--threads {job.threads} is more than {MOST_THREADS}", "no more than there are CPU cores")
        torch.set_num_threads(job.threads)
    source = open_source(
        job.model, revision=job.revision, cache=cache, trust_remote_code=job.trust_remote_code, progress=progress
    )
    if source.folder.resolve() == out.resolve():
        raise InputError(f"--out {out} is the model itself", "choose another folder")
    _check_positions(source, job)
    skeleton = Skeleton(
        source.config,
        SafetensorsFolder(source.folder),
        dtype=getattr(torch, job.dtype) if job.dtype else None,
        compute=_compute_dtype(source, device),
        device=device,
        trust_remote_code=job.trust_remote_code,
    )
    plan = make_plan(skeleton, goal.pattern, job.only, job.skip)
    structure = None
    any_tokens = torch.arange(64)[None] % source.config.get_text_config().vocab_size
    if goal.removals:
        structure = plan_structure(
            skeleton,
            goal.removals,
            all_couplings(skeleton, any_tokens),
            job.round_to,
            goal.pattern,
            job.trust_remote_code,
        )
        if remover is not None and remover.scaled:
            check_channel_scales(skeleton, structure)
        plan = plan.smaller(structure.touched if goal.pattern is None else None, structure.saved(skeleton))
        for said in structure.said:
            progress.note(said)
    if recipe.method == "scaling":
        _check_scales(skeleton, plan, any_tokens)
    calibration, evaluation = _tokens(job, source, cache, progress)
    recipe, left_out = with_room_to_write(recipe, job, skeleton, calibration.tokens.shape[1])
    if left_out:
        progress.warn(left_out)
    check_refinement(recipe, calibration)
    overlap = shared_runs(calibration.tokens, evaluation.tokens) if evaluation else 0.0
    run = Prepared(
        job, source, goal, recipe, solver, remover, structure, skeleton, plan, calibration, evaluation, overlap, out,
        left_out=left_out,
    )  # fmt: skip
    _check_space(run)
    return run


def _check_scales(skeleton: Skeleton, plan: Plan, tokens: Tensor) -> None:
    """Refuse layers that no norm feeds."""
    kinds = all_kinds(skeleton, tokens)
    fed = {
        f"{skeleton.block_name(index)}.{local}"
        for index in range(len(skeleton.blocks))
        for local in kinds.scales(index)
    }
    unfed = [layer.name for layer in plan.layers if layer.name not in fed]
    if unfed:
        flags = dict.fromkeys(f"--skip '*.{name.rpartition('.')[2]}'" for name in unfed)
        raise InputError(
            f"no norm feeds {unfed[0]!r}, so its inputs have no learned scale",
            f"leave such layers out: {' '.join(flags)}",
        )


def with_room_to_write(recipe: Recipe, job: Job, skeleton: Skeleton, length: int) -> tuple[Recipe, str]:
    """The recipe without text by the model itself where it cannot write, and why; refused if the user asked for it."""
    try:
        if recipe.own:
            check_room(skeleton, length)
    except InputError as error:
        if job.own:
            raise
        return replace(recipe, own=0.0), f"{job.effort} goes without text by the model itself: {error}"
    return recipe, ""


def check_refinement(recipe: Recipe, calibration: TokenBatch) -> None:
    """A block is judged on batches that it was not trained on, so one window is too few."""
    windows = len(calibration.tokens)
    if recipe.refine and windows < LEAST_SAMPLES:
        raise InputError(
            f"refinement holds out some of the calibration windows: it needs {LEAST_SAMPLES}, there is {windows}",
            "use more windows (--samples), or leave refinement out (--refine 0)",
        )


def output_folder(job: Job, goal: Sparsity) -> Path:
    """The folder to be made; it must not exist yet, unless it holds a model and `--overwrite` is given."""
    if job.out is None:
        model = Path(job.model).stem if job.model.endswith(".gguf") else Path(job.model).name
        out = Path(f"{model or 'model'}-{job.label}-{_spelled(goal.name)}")
    else:
        out = job.out
    try:
        # A link stays a link: what it points to is replaced.
        out = Path(os.path.realpath(out.expanduser()))
        out.with_name(f".{out.name}.partial").exists()
    except (OSError, ValueError) as error:
        raise InputError(f"--out {str(out)[:80]!r} is no usable path: {error}", "choose another --out") from error
    if out.is_dir() and any(out.iterdir()):
        if not (out / FILE).exists():
            raise InputError(
                f"{out} exists and was not written by llmprune", "choose another --out; nothing was touched"
            )
        if not job.overwrite:
            raise InputError(
                f"{out} exists already",
                "add --overwrite to replace it when the new one is complete, or choose another --out",
            )
    elif out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "choose another --out")
    return out


def _spelled(name: str) -> str:
    """A pattern's name as part of a file name: `2of4`, `channels25pct`."""
    for old, new in (("channels:", "channels"), ("heads:", "heads"), (":", "of"), ("%", "pct"), ("+", "-")):
        name = name.replace(old, new)
    return name


def _check_space(run: Prepared) -> None:
    """Refuse an output that cannot be written, or does not fit beside the hidden states on their way to it."""
    parent = run.out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write below {parent}", "choose another --out")
    there = sum(path.stat().st_size for path in run.partial.rglob("*") if path.is_file())
    needed = run.plan.out_bytes + run.resting_bytes + 32 * 2**20 - there
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{run.out} needs {needed / 2**20:,.0f} MiB, but {parent} has {free / 2**20:,.0f} MiB free",
            "free disk space, choose another --out, or store in fewer bytes with --dtype bfloat16",
        )


def _check_positions(source: Source, job: Job) -> None:
    limit = _positions(source)
    asked = {"--seq-len": job.seq_len or 0, "--eval-context": (job.eval_context or 0) if job.evaluate else 0}
    for flag, value in asked.items():
        if value > limit:
            raise InputError(f"{flag} {value} exceeds the model's {limit} positions", f"use {flag} {limit} or less")


def _positions(source: Source) -> int:
    """The longest text the model can take, in tokens."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def _tokens(job: Job, source: Source, cache: Path, progress: Progress) -> tuple[TokenBatch, TokenBatch | None]:
    text = source.config.get_text_config()
    calib = Path(job.calibration_source)
    frozen = calib.suffix == ".safetensors"
    tokenizer = None if frozen and not job.evaluate else load_tokenizer(source, job.trust_remote_code)
    if frozen:
        calibration = load_tokens(calib, job.samples, job.seq_len, text.vocab_size)
    else:
        assert tokenizer is not None
        calibration = calibration_tokens(
            job.calibration_source,
            tokenizer,
            samples=job.samples or DEFAULT_SAMPLES,
            seq_len=job.seq_len or min(DEFAULT_SEQ_LEN, _positions(source)),
            seed=job.seed,
            cache=cache,
            progress=progress,
        )
    evaluation = None
    if job.evaluate:
        assert tokenizer is not None
        evaluation = evaluation_tokens(
            job.evaluation_source,
            tokenizer,
            windows=job.eval_windows,
            context=job.eval_context or min(DEFAULT_CONTEXT, _positions(source)),
            cache=cache,
            progress=progress,
        )
    for batch in filter(None, (calibration, evaluation)):
        if (largest := int(batch.tokens.max())) >= text.vocab_size:
            raise InputError(
                f"the tokenizer gives id {largest}, the model's vocabulary ends at {text.vocab_size - 1}",
                "the tokenizer does not belong to this model",
            )
    return calibration, evaluation


def _compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    """Float32 on the CPU; on an accelerator what the model was made for."""
    own = source.config.dtype
    if device.type == "cpu" or own not in {torch.float16, torch.bfloat16}:
        return torch.float32
    assert isinstance(own, torch.dtype)
    return own
