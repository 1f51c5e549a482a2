"""Chooses blocks, heads and channels for a size such as `size:75%`, before the run that removes them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from llmprune.errors import InputError
from llmprune.job import Job
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.output import exists_already, output_folder, workdir_of
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.resolve import resolve
from llmprune.pipeline.size_errors import size_errors
from llmprune.pipeline.size_options import Options, options_of
from llmprune.pipeline.size_search import SizeSearch
from llmprune.pipeline.size_trial import Trial, with_sparsity
from llmprune.pipeline.state import STATE, read_state
from llmprune.pipeline.workdir import SIZED
from llmprune.progress import Progress
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import AUTO, Stages
from llmprune.pruning.sparsity import Kind, Removal, Sparsity, parse_sparsity
from llmprune.reporting.report import PruneReport
from llmprune.runtime.files import is_occupied
from llmprune.runtime.process_group import SINGLE, ProcessGroup

LEAST_WINDOWS = 2
"""One to fit to, one to measure on."""


def choose_sizes(job: Job, group: ProcessGroup, progress: Progress) -> Job:
    """The job with the removals that are chosen for the size it asks for; as it is where it asks for none.

    On about `TOKENS` calibration tokens, the errors that every kind of removal causes in the residual stream are
    measured in two passes over the dense model, and what the model becomes without some parts in a pass for every
    trial, see `SizeSearch`.

    Args:
        job: what the user asked for.
        group: the processes; all pass the same tokens, and what rank 0 chooses counts.
        progress: told what is chosen, and why.

    Raises:
        InputError: the model cannot lose that much, or the job cannot be done.
    """
    goal = job.goal
    if goal.size is None:
        return job
    job = replace(job, out=output_folder(job, goal), asked=goal.name)
    known: str = group.broadcast_object(_known(job) if group.is_main else "")
    if not known:
        run, options = _checked(job, group)
        known = group.broadcast_object(_chosen(run, options, job, progress))
    return with_sparsity(job, parse_sparsity(known))


def counted(job: Job, progress: Progress) -> Job:
    """The job with removals of about the size it asks for, whose time and memory can be estimated before the choice."""
    goal = job.goal
    if goal.size is None:
        return job
    job = replace(job, out=output_folder(job, goal), asked=goal.name)
    _, options = _checked(job, SINGLE, headers_only=True)
    example = _example(goal, options.kinds[0])
    progress.note(f"{goal.name} is counted as {example.name}, and without the choice: what goes is not known yet")
    return with_sparsity(job, example)


def _known(job: Job) -> str:
    """What was chosen for this size in the run that made the output folder, or was stopped; '' if there is none."""
    assert job.out is not None
    if is_occupied(job.out) and not job.overwrite:
        report = PruneReport.read(job.out)
        if report.sparsity.get("asked") != job.asked:
            raise exists_already(job.out)
        return str(report.sparsity["pattern"])
    before: dict[str, str] = {} if job.restart else read_state(workdir_of(job.out) / STATE).get("run", {})
    return before["--sparsity"] if before.get(SIZED) == job.asked else ""


def _checked(job: Job, group: ProcessGroup, headers_only: bool = False) -> tuple[RunContext, Options]:
    """A run of the same model and texts that loses nothing, and what could be lost.

    Raises:
        InputError: the job cannot be done, whatever is chosen.
    """
    if job.method != AUTO and (job.method not in METHODS or job.goal.pattern is None):
        raise InputError(
            f"--method {job.method} does not apply to {job.goal.name}, which removes parts of several kinds",
            "leave it out, or name the parts: channels:25%, blocks:20%",
        )
    run = prepare(_plain(job), Progress(), group, headers_only=headers_only)
    if (windows := len(run.data.calibration.tokens)) < LEAST_WINDOWS:
        raise InputError(
            f"{job.goal.name} is chosen on held-out calibration windows: it needs {LEAST_WINDOWS}, there is {windows}",
            "use more windows (--samples)",
        )
    options = options_of(run, job.round_to)
    for kind in options.kinds:
        resolve(with_sparsity(job, _example(job.goal, kind)), group)
    return run, options


def _plain(job: Job) -> Job:
    """A job without removals, so that model, texts and output can be checked before anything is chosen."""
    pattern = job.goal.pattern
    plain: dict[str, Any] = {stage.name: None for stage in fields(Stages)}
    return replace(job, **plain, sparsity=pattern.name if pattern else "50%", method=AUTO, options=(), round_to=None)


def _example(goal: Sparsity, kind: Kind) -> Sparsity:
    """One with removals of one kind."""
    assert goal.size is not None
    return goal.chosen([Removal(kind, 1 - goal.size)])


def _chosen(run: RunContext, options: Options, job: Job, progress: Progress) -> str:
    """The sparsity that is chosen for the size a job asks for."""
    goal = job.goal
    assert goal.size is not None
    errors, adders = size_errors(run, options, goal.size, progress)
    search = SizeSearch(options, goal, errors, Trial(run, job, options.plan, adders), progress)
    if search.best(errors) is None:
        raise InputError(
            f"{goal.name} is less than can be left: {', '.join(options.kinds)} can be removed",
            "choose a larger size, or prune the folder that results once more",
        )
    return goal.chosen(search.removals()).name
