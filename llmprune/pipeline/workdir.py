"""The working directory of a run: locked, for one job, and removed once that is done."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from llmprune.errors import InputError, PruneError
from llmprune.job import Job
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.state import AGAIN, LOCK, RunState, WorkerState
from llmprune.progress import Progress
from llmprune.pruning.sparsity import Sparsity
from llmprune.reporting.report import FILE
from llmprune.runtime.files import sha256


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
        raise PruneError(f"cannot write {run.rank_workdir}: {error.strerror or error}", AGAIN) from error


@contextmanager
def _main(run: RunContext, progress: Progress) -> Iterator[RunState]:
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {run.workdir}: {error.strerror}", "choose another --out") from error
    with _locked(run.workdir / LOCK):
        state = RunState(run, progress)
        try:
            # Another process may have finished since this one looked.
            output_folder(run.job, run.sparsity)
            state.open(fingerprint_of(run), run.job.restart)
            run.group.barrier()
            progress.note(f"writing to {run.workdir} until everything is done")
            yield state
        except InputError:
            # Whatever was finished of a job that cannot be done is of no use.
            _leave(run, state, progress, keep=state.resumed)
            raise
        except OSError as error:
            _leave(run, state, progress)
            raise PruneError(f"cannot write {run.workdir}: {error.strerror or error}", AGAIN) from error
        except BaseException:
            _leave(run, state, progress)
            raise
        shutil.rmtree(run.workdir, ignore_errors=True)


def _leave(run: RunContext, state: RunState, progress: Progress, keep: bool = True) -> None:
    if not state.blocks or not keep:
        shutil.rmtree(run.workdir, ignore_errors=True)
        return
    progress.warn(
        f"{state.blocks} of {len(run.skeleton.blocks)} blocks are finished and kept in {run.workdir}; "
        "the same command goes on from there, --restart starts over"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        lock = path.open("a")
    except OSError as error:
        raise InputError(f"cannot write {path.parent}: {error.strerror}", "choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except OSError:
            mine = False
        if not mine:
            raise InputError(
                f"another llmprune is writing to {path.parent}", "wait for it to end, or choose another --out"
            )
        yield


def output_folder(job: Job, sparsity: Sparsity) -> Path:
    """The folder to be made; it must not exist yet, unless it holds a model and `--overwrite` is given."""
    if job.out is None:
        model = Path(job.model).stem if job.model.endswith(".gguf") else Path(job.model).name
        out = Path(f"{model or 'model'}-{job.label}-{_spelled(sparsity.name)}")
    else:
        out = job.out
    try:
        # A link stays a link: its target is replaced.
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


def fingerprint_of(run: RunContext) -> dict[str, str]:
    """All that the result depends on, except the weights, by the names that the user knows them under."""
    job, device = run.job, run.skeleton.device
    tokens = {"calibration tokens": run.data.calibration, "evaluation tokens": run.data.evaluation}
    facts: dict[str, object] = {
        "--sparsity": run.sparsity.name,
        "--scope": run.sparsity.scope,
        **{f"--{key.replace('_', '-')}": value for key, value in asdict(run.recipe).items()},
        "--option": run.solver.options,
        "sizes": run.structure.changes,
        "--only": job.only,
        "--skip": job.skip,
        "--dtype": job.dtype,
        "--seed": job.seed if run.recipe.reconstruct or run.recipe.self_calibration else None,
        "--device": f"{device.type} ({run.skeleton.compute})",
        "--threads": torch.get_num_threads(),
        "number of processes": run.group.world_size,
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
