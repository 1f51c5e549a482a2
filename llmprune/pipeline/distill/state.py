"""The working directory of a distillation, from which the same command resumes after a stop.

Beside the trainer's checkpoints it holds the windows that the teacher generated, the teacher's probabilities where they
are kept, and `state.json`, which says of what job they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import InputError, PruneError, complete
from llmprune.pipeline.distill.context import DistillContext
from llmprune.pipeline.output import exists_already
from llmprune.pipeline.state import GENERATED, STATE
from llmprune.progress import Progress
from llmprune.reporting.report import FILE, PruneReport
from llmprune.runtime.files import is_occupied, sha256, write_json
from llmprune.runtime.filesystem import sync
from llmprune.runtime.foreign import read_json
from llmprune.runtime.ownership import clear, delete, own_folder, remove
from llmprune.sources.tokens import TokenBatch

TOP = "teacher.safetensors"
"""The teacher's probabilities."""
RESUME_HINT = "free disk space and run the same command again, or choose another --out"
TRAINER_STATE = "trainer_state.json"
"""The last file of a checkpoint that the trainer writes."""
WITHOUT_EFFECT = {
    "folder", "teacher", "revision", "calib", "evaluate", "eval_text", "eval_windows", "eval_context", "out", "restart",
    "activation_memory", "cache_dir", "trust_remote_code", "device", "threads", "at_once", "precision", "top_k",
}  # fmt: skip
"""Settings that the result does not depend on, or that the fingerprint has by their effect."""


def fingerprint_of(run: DistillContext) -> dict[str, str]:
    """All that the result depends on, by the names that the user knows it under."""

    def said(batch: TokenBatch | None) -> str:
        return f"{tuple(batch.tokens.shape)}, sha256 {batch.provenance.sha256[:12]}" if batch else "none"

    settings = {each.name: getattr(run.job, each.name) for each in fields(run.job)}
    facts: dict[str, Any] = {
        **{f"--{name.replace('_', '-')}": value for name, value in settings.items() if name not in WITHOUT_EFFECT},
        "training tokens": said(run.data.calibration),
        "held-out tokens": said(run.held_out),
        "evaluation tokens": said(run.data.evaluation),
        "--top-k": run.top_k,
        "--at-once": run.at_once,
        "--precision": run.precision,
        "--device": run.device.type,
        "--threads": torch.get_num_threads(),
        "number of processes": run.group.world_size,
        "the pruned folder's report": sha256(run.folder / FILE)[:12],
        **run.weights,
        **run.versions,
    }
    facts.pop("--command", None)
    if run.job.trust_remote_code:
        digests = "".join(sha256(path) for path in sorted(run.source.folder.glob("*.py")))
        facts["the model's code"] = hashlib.sha256(digests.encode()).hexdigest()[:12]
    return {name: str(value) for name, value in facts.items()}


def finished(run: DistillContext, progress: Progress) -> PruneReport | None:
    """The report of this very distillation, where the output folder is its whole result already.

    Raises:
        InputError: the folder holds something else.
    """
    if not is_occupied(run.out):
        return None
    with suppress(InputError):
        report = PruneReport.read(run.out)
        whole = all((run.out / name).is_file() for name in report.files)
        if whole and report.distillation.get("fingerprint") == fingerprint_of(run):
            progress.note(f"done already: {run.out} is the result of this command")
            report.out = str(run.out)
            return report
    raise _occupied(run.out)


def _occupied(out: Path) -> InputError:
    return InputError(exists_already(out).message, "choose another --out, or remove it; nothing was touched")


@contextmanager
def open_workdir(run: DistillContext, progress: Progress) -> Iterator[None]:
    """The working directory, for this run alone; checkpoints outlive a failure, and the finished folder gets its name.

    Raises:
        InputError: it cannot be made, another run works there, or it holds the work of another job.
        PruneError: the disk is full, or gone.
    """
    if not run.group.is_main:
        run.group.barrier()
        yield
        return
    try:
        with own_folder(run.workdir):
            _open(run, progress)
            with _kept(run, progress):
                run.group.barrier()
                yield
                _publish(run)
            with complete(run.out):
                remove(run.workdir, last=(STATE,))
    except OSError as error:
        raise PruneError(f"cannot write {run.workdir}: {error.strerror or error}", RESUME_HINT) from error


def _open(run: DistillContext, progress: Progress) -> None:
    """Resume what an earlier run left, or clear the folder."""
    now, before = fingerprint_of(run), {}
    if (run.workdir / STATE).exists() and not run.job.restart:
        with suppress(InputError):
            before = read_json(run.workdir / STATE)
    steps = steps_done(run.checkpoints)
    if before != now:
        for name in now if before and steps else ():
            if (was := before.get(name)) != now[name]:
                raise InputError(
                    f"{run.workdir} holds the work of another distillation: {name} was {was}, now {now[name]}",
                    "repeat that command to go on from there, drop its work with --restart, or choose another --out",
                )
        clear(run.workdir)
        write_json(run.workdir / STATE, now)
    elif steps:
        progress.note(f"{steps} of {run.steps} steps were done before; going on from there")
    if run.unfinished.exists():
        delete(run.unfinished)


@contextmanager
def _kept(run: DistillContext, progress: Progress) -> Iterator[None]:
    """Keep checkpoints, and what the teacher gave, of a run that fails; without such the working directory goes."""
    try:
        yield
    except BaseException:
        if run.out.exists() and not run.unfinished.exists():
            with complete(run.out):
                raise
        if steps := steps_done(run.checkpoints):
            progress.warn(
                f"{steps} of {run.steps} steps are kept in {run.workdir}; the same command goes on from there, "
                "--restart starts over"
            )
        elif not any((run.workdir / name).exists() for name in (GENERATED, TOP)):
            remove(run.workdir)
        raise


def _publish(run: DistillContext) -> None:
    """Rename the finished folder."""
    if is_occupied(run.out):
        # It was free when the run began.
        raise PruneError(_occupied(run.out).message, "move it away and run the same command again")
    run.unfinished.replace(run.out)
    with suppress(OSError):
        sync(run.out.parent)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a trainer; None if there is none. Damaged ones are of no use and are removed."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        try:
            found.append((int(read_json(path / TRAINER_STATE)["global_step"]), path))
        except (FileNotFoundError, InputError, KeyError, TypeError, ValueError):
            delete(path)
    return max(found)[1] if found else None


def steps_done(folder: Path) -> int:
    """Number of steps in the newest checkpoint."""
    last = last_checkpoint(folder)
    return int(read_json(last / TRAINER_STATE)["global_step"]) if last else 0
