"""The story of a distillation: every process runs the same lines; rank 0 also writes and reports for all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llmprune.distill_job import DistillJob
from llmprune.errors import CheckError, PruneError, complete, first_line
from llmprune.export.verify import verify_folder
from llmprune.pipeline.distill.context import DistillContext
from llmprune.pipeline.distill.prepare import open_folder, prepare_distillation
from llmprune.pipeline.distill.publish import distillation_facts, write_companions, write_weights
from llmprune.pipeline.distill.state import finished, last_checkpoint, open_workdir, steps_done
from llmprune.pipeline.distill.student import Student, open_student, zero_parameters
from llmprune.pipeline.distill.teaching import all_windows, generated_windows, teacher_of
from llmprune.pipeline.evaluation import measured
from llmprune.pipeline.timing import Clock
from llmprune.progress import Progress
from llmprune.reporting.report import PruneReport
from llmprune.runtime.launch import launch
from llmprune.runtime.oom import out_of_memory
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.perplexity import Perplexity
from llmprune.training.distillation import Distilled, Loss, Recomputed
from llmprune.training.trainer import Outcome, Schedule, Watch, train


def distill(job: DistillJob, progress: Progress | None = None) -> PruneReport:
    """Train a pruned model on the dense model's next-token distributions; its zeros and its sizes stay.

    The loss of a token is `(1 − mix) T² KL(softmax(t / T) ‖ softmax(s / T)) − mix log softmax(s)[next]` of logits t of
    the teacher and s of the student. The weights with the least held-out divergence are kept. Gradients cross the whole
    model, which is in memory with its moments.

    Args:
        job: what to do.
        progress: told what happens; `ProgressBars()` draws it, None is silent.

    Raises:
        InputError: the job cannot be done; nothing was written.
        PruneError: it failed; nothing is left at `job.out`, but checkpoints are kept for the same job.
    """
    with launch(job.device) as (group, device):
        return _distill(replace(job, device=device), group, progress if progress and group.is_main else Progress())


def _distill(job: DistillJob, group: ProcessGroup, progress: Progress) -> PruneReport:
    clock = Clock()
    with clock("total"):
        with clock("prepare"):
            run = prepare_distillation(job, progress, group)
            found = finished(run, progress) if group.is_main else None
        if group.broadcast_object(found is not None):
            return found or replace(PruneReport.read(run.out), out=str(run.out))
        with open_workdir(run, progress):
            with clock("generate") if run.generated_windows else nullcontext():
                generated = generated_windows(run, progress)
            windows = all_windows(run, generated)
            with clock("train"):
                outcome = _train(run, windows, progress)
            if group.is_main:
                with clock("verify"):
                    _verify(run, progress)
                with clock("evaluation"):
                    places = (("pruned perplexity", run.folder), ("distilled perplexity", run.unfinished))
                    pruned, distilled = (_evaluate(run, folder, label, progress) for label, folder in places)
                report = replace(run.report, out=str(run.out))
                report.distillation = distillation_facts(run, windows, generated, outcome, (pruned, distilled))
                report.distillation["seconds"] = {key: round(spent, 3) for key, spent in clock.so_far().items()}
                write_companions(run, report)
        with complete(run.out):
            group.final_barrier()
    return report if group.is_main else replace(PruneReport.read(run.out), out=str(run.out))


def _train(run: DistillContext, windows: Tensor, progress: Progress) -> Outcome:
    """Train, and write the weights that are kept."""
    student = open_student(run)
    if run.job.gradient_checkpointing:
        # The method of older versions of transformers has another name.
        model = student.model
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    try:
        outcome = _taught(run, student, windows, progress)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise PruneError(
            f"the device's memory does not hold this distillation: {first_line(error)}",
            "add --gradient-checkpointing, or use a smaller --at-once or --seq-len",
        ) from error
    if not outcome.kept:
        progress.warn("no step lowered the held-out divergence: the weights are those of the pruned folder")
    if run.group.is_main:
        write_weights(run, student.tensors(run) if outcome.kept else ())
    return outcome


def _taught(run: DistillContext, student: Student, windows: Tensor, progress: Progress) -> Outcome:
    """Train a student, with the teacher in memory beside it."""
    job = run.job
    schedule = Schedule(
        steps=run.steps,
        interval=run.interval,
        learning_rate=job.learning_rate,
        batch_size=job.batch_size,
        at_once=run.at_once,
        seed=job.seed,
        precision=run.precision,
    )
    with run.teacher.loaded(run.teacher.text_parameters(), whole=True):
        teacher = Recomputed(run.teacher.model, run.device)
        learnt = teacher_of(run, windows, teacher, progress)
        model = Distilled(student.model, (learnt, teacher), Loss(job.temperature, job.mix), run.device)
        progress.start("distilling", run.steps - steps_done(run.checkpoints))
        outcome = train(
            model,
            (windows, run.held_out.tokens),
            zero_parameters(run, student),
            schedule,
            run.checkpoints,
            last_checkpoint(run.checkpoints),
            Watch(progress.step, progress.note),
        )
        progress.finish()
    return outcome


def _verify(run: DistillContext, progress: Progress) -> None:
    """Check the pattern and the sizes of the written files.

    Raises:
        CheckError: a zero is missing.
    """
    progress.note("verifying")
    write_companions(run, run.report)
    found = verify_folder(run.unfinished, trust_remote_code=run.job.trust_remote_code)
    if found.violations:
        raise CheckError(f"the distilled model has {found.violations} violations of its pattern", "please report it")


def _evaluate(run: DistillContext, folder: Path, label: str, progress: Progress) -> Perplexity | None:
    """The perplexity of the model in `folder`; None if the job does not ask for it."""
    if (batch := run.data.evaluation) is None:
        return None
    skeleton = open_folder(folder, run.report, run.device, run.job.trust_remote_code)
    return measured(skeleton, batch, run.workdir, run.job.activation_memory, (progress, label))
