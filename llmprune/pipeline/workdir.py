"""The working directory of a run: locked, for one job, and removed once that is done."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from llmprune.errors import InputError, PruneError, UnreadableError, complete
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.output import exists_already, output_folder
from llmprune.pipeline.state import FORMAT, RESUME_HINT, STATE, VERSION, RunState, WorkerState, read_state
from llmprune.pipeline.steps import check_weights
from llmprune.progress import Progress
from llmprune.reporting.report import PruneReport
from llmprune.runtime.files import is_occupied, sha256
from llmprune.runtime.filesystem import sync
from llmprune.runtime.ownership import delete, own_folder, remove

REPLACED = "replaced"
"""Where an output folder waits while the new one takes its name."""
WEIGHTS = "the model's weights"


@contextmanager
def open_workdir(run: RunContext, progress: Progress) -> Iterator[WorkerState]:
    """The working directory, for this run alone; finished blocks outlive a failure.

    Yields:
        the state of the run: all of it in rank 0, in the other processes that of their own windows.

    Raises:
        InputError: it cannot be made, another run works there, or it holds another run's blocks.
        PruneError: the disk is full, or gone.
    """
    opened = _main(run, progress) if run.group.is_main else _worker(run, progress)
    with opened as state:
        yield state


@contextmanager
def _worker(run: RunContext, progress: Progress) -> Iterator[WorkerState]:
    run.group.barrier()
    try:
        run.rank_workdir.mkdir(exist_ok=True)
        yield WorkerState(run, progress)
    except OSError as error:
        raise PruneError(f"cannot write {run.rank_workdir}: {error.strerror or error}", RESUME_HINT) from error


@contextmanager
def _main(run: RunContext, progress: Progress) -> Iterator[RunState]:
    try:
        with own_folder(run.workdir):
            _restore(run)
            state = RunState(run, progress)
            with _kept(run, state, progress):
                # Another process may have finished since this one looked.
                _check_free(run)
                state.open(fingerprint_of(run), run.job.restart)
                run.group.barrier()
                progress.note(f"writing to {run.workdir} until everything is done")
                yield state
                _publish(run)
            with complete(run.out):
                remove(run.workdir, last=(STATE,))
    except OSError as error:
        raise InputError(f"cannot write {run.workdir}: {error.strerror or error}", "choose another --out") from error


@contextmanager
def _kept(run: RunContext, state: RunState, progress: Progress) -> Iterator[None]:
    """Keep the finished blocks of a run that fails.

    The working directory goes if there are none, or if they are of a job that turned out to be impossible.
    """
    try:
        yield
    except BaseException as error:
        if state.sealed and not run.unfinished.exists():
            # It was renamed.
            with complete(run.out):
                raise
        impossible = isinstance(error, InputError) and not isinstance(error, UnreadableError)
        if state.blocks and (state.resumed or not impossible):
            progress.warn(
                f"{state.blocks} of {len(run.skeleton.blocks)} blocks are finished and kept in {run.workdir}; "
                "the same command goes on from there, --restart starts over"
            )
        else:
            remove(run.workdir)
        if isinstance(error, OSError):
            raise PruneError(f"cannot write {run.workdir}: {error.strerror or error}", RESUME_HINT) from error
        if isinstance(error, UnreadableError) and state.blocks:
            raise PruneError(error.message, error.hint) from error
        raise


def _check_free(run: RunContext) -> None:
    """Refuse an output that another process or the user has made since this one looked."""
    output_folder(run.job, run.sparsity)
    if is_occupied(run.out) and not run.job.overwrite:
        raise exists_already(run.out)


def _publish(run: RunContext) -> None:
    """Rename the finished model to the output folder; what that replaces waits in the working directory meanwhile."""
    try:
        _check_free(run)
    except InputError as error:
        # It was free when the run began.
        raise PruneError(error.message, error.hint) from error
    try:
        if run.out.exists():
            os.replace(run.out, run.workdir / REPLACED)
        os.replace(run.unfinished, run.out)
    except BaseException:
        _restore(run)
        raise
    with suppress(OSError):  # it is in place
        sync(run.out.parent)


def _restore(run: RunContext) -> None:
    """Put back what a run was about to replace when it was stopped; where it has been replaced, delete it."""
    replaced = run.workdir / REPLACED
    if replaced.exists():
        if run.out.exists():
            delete(replaced)
        else:
            os.replace(replaced, run.out)


# The result of the same job


def check_finished(run: RunContext) -> None:
    """Refuse an output folder that holds the result of another job, as far as that is known without the weights.

    Raises:
        InputError: it does.
    """
    if is_occupied(run.out) and not run.job.overwrite:
        _refuse(run, _difference(run, fingerprint_of(run)))


def finished(run: RunContext, progress: Progress) -> PruneReport | None:
    """The report of this very job, where the output folder is its whole result already; what is left of its work goes.

    With `--overwrite` that is so only where a run was stopped between its last rename and its end.

    Raises:
        InputError: the folder holds the result of another job.
    """
    found = run.group.is_main and is_occupied(run.out) and (not run.job.overwrite or _was_renamed(run))
    if found:
        difference = _difference(run, {WEIGHTS: check_weights(run, progress)})
        if not run.job.overwrite:
            _refuse(run, difference)
        found = difference is None
    if found:
        _remove_rest(run)
        progress.note(f"done already: {run.out} is the result of this command")
    if not run.group.broadcast_object(found):
        return None
    return replace(PruneReport.read(run.out), out=str(run.out))


def _difference(run: RunContext, wanted: Mapping[str, str]) -> str | None:
    """What tells the output folder from the result of this job; None if it is that result."""
    report = PruneReport.read(run.out)
    for name, now in wanted.items():
        if (before := report.fingerprint.get(name)) != now:
            return f": {name} was {before}, now {now}" if before else ""
    missing = [name for name in report.files if not (run.out / name).is_file()]
    return f", but lacks {missing[0]}" if missing else None


def _refuse(run: RunContext, difference: str | None) -> None:
    if difference is not None:
        raise exists_already(run.out, difference)


def _was_renamed(run: RunContext) -> bool:
    """Whether the working directory is that of a run of this job that was stopped behind its last rename."""
    state = read_state(run.workdir / STATE)
    return (
        _difference(run, fingerprint_of(run)) is None
        and bool(state)
        and not run.unfinished.exists()
        and _made_output(run, state)
    )


def _made_output(run: RunContext, state: Mapping[str, Any]) -> bool:
    """Whether a saved state is of the run that made the output folder."""
    made, saved = PruneReport.read(run.out).fingerprint, dict(state["run"])
    return all(saved.get(name) == value for name, value in made.items())


def _remove_rest(run: RunContext) -> None:
    """Remove the working directory of the run that made the output folder, if that was stopped before it could."""
    state = read_state(run.workdir / STATE)
    if run.workdir.exists() and (not state or _made_output(run, state)):
        with suppress(InputError, OSError), own_folder(run.workdir):
            remove(run.workdir, last=(STATE,))


SIZED = "--sparsity, as asked for"
"""Under this name a fingerprint says for which size the removals were chosen."""
FLAGS = {
    "compensate": "--no-refit",
    "criterion": "--method, of channels and heads",
    "block_criterion": "--method, of blocks",
}
"""Stages of a recipe that no flag of their own sets."""


def fingerprint_of(run: RunContext) -> dict[str, str]:
    """All that the result depends on, except the weights, by the names that the user knows them under."""
    job, device = run.job, run.skeleton.device
    tokens = {"calibration tokens": run.data.calibration, "evaluation tokens": run.data.evaluation}
    begin = (run.data.evaluation or run.data.calibration).bos_tokens
    facts: dict[str, object] = {
        FORMAT: VERSION,
        "--sparsity": run.sparsity.name,
        **({SIZED: job.asked} if job.asked else {}),
        "--scope": run.sparsity.scope,
        **({"--quantize": f"{run.grid.name}, scales in {run.grid.scale_dtype}"} if run.grid else {}),
        **{FLAGS.get(key, f"--{key.replace('_', '-')}"): value for key, value in asdict(run.recipe).items()},
        "--option": run.solver.options,
        "sizes": run.structure.changes,
        "--only": job.only,
        "--skip": job.skip,
        "--dtype": job.dtype,
        "--max-shard-size": job.max_shard_size,
        "--seed": job.seed if run.recipe.reconstruct or run.recipe.self_calibration else None,
        "--device": f"{device.type} ({run.skeleton.compute})",
        "--threads": torch.get_num_threads(),
        "number of processes": run.group.world_size,
        "--bos": "yes" if begin else "no",
        **{
            name: batch and f"{tuple(batch.tokens.shape)}, sha256 {batch.provenance.sha256[:12]}"
            for name, batch in tokens.items()
        },
        "the model's config": sha256(run.source.folder / "config.json")[:12],
        **run.versions,
    }
    if job.trust_remote_code:
        digests = "".join(sha256(path) for path in sorted(run.source.folder.glob("*.py")))
        facts["the model's code"] = hashlib.sha256(digests.encode()).hexdigest()[:12]
    return {name: str(value) for name, value in facts.items()}
