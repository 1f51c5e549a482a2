"""The folder for the work in progress: locked, for one job, and gone once that is done."""

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
from llmprune.pipeline.context import Prepared
from llmprune.pipeline.prepare import output_folder
from llmprune.pipeline.state import AGAIN, LOCK, Journal
from llmprune.progress import Progress
from llmprune.runtime.files import sha256


@contextmanager
def workplace(run: Prepared, progress: Progress) -> Iterator[Journal]:
    """The folder for the work in progress, for this process alone; finished blocks outlive a failure.

    Raises:
        InputError: it cannot be made, another process works there, or it holds another run.
        PruneError: the disk is full, or gone.
    """
    try:
        run.partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {run.partial}: {error.strerror}", "choose another --out") from error
    with _locked(run.partial / LOCK):
        journal = Journal(run, progress)
        try:
            # Another process may have finished since this one looked.
            output_folder(run.job, run.goal)
            journal.open(facts_of(run), run.job.restart)
            progress.note(f"writing to {run.partial} until everything is done")
            yield journal
        except InputError:
            # Whatever was finished of a job that cannot be done is of no use.
            _leave(run, journal, progress, keep=journal.resumed)
            raise
        except OSError as error:
            _leave(run, journal, progress)
            raise PruneError(f"cannot write {run.partial}: {error.strerror or error}", AGAIN) from error
        except BaseException:
            _leave(run, journal, progress)
            raise
        shutil.rmtree(run.partial, ignore_errors=True)


def _leave(run: Prepared, journal: Journal, progress: Progress, keep: bool = True) -> None:
    if not journal.blocks or not keep:
        shutil.rmtree(run.partial, ignore_errors=True)
        return
    progress.warn(
        f"{journal.blocks} of {len(run.skeleton.blocks)} blocks are finished and kept in {run.partial}; "
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


def facts_of(run: Prepared) -> dict[str, str]:
    """All that the result depends on, except the weights, by the names that the user knows them under."""
    job, device = run.job, run.skeleton.device
    tokens = {"calibration tokens": run.calibration, "evaluation tokens": run.evaluation}
    facts: dict[str, object] = {
        "--sparsity": run.goal.name,
        "--scope": getattr(run.pattern, "scope", "group"),
        **{f"--{key}": value for key, value in asdict(run.recipe).items()},
        "--option": run.options,
        "sizes": run.structure.changes if run.structure else {},
        "--only": job.only,
        "--skip": job.skip,
        "--dtype": job.dtype,
        "--seed": job.seed if run.recipe.refine or run.recipe.own else None,
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
