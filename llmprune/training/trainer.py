"""Distillation by transformers' `Trainer`: its optimiser, schedule, checkpoints and processes, with zeros held."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llmprune.training.distillation import Distilled, windows_of
from llmprune.training.keep_zeros import KeepZeros

WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises."""
OPTIMIZER, SCHEDULE = "adamw_torch", "cosine"


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast is trained.

    Args:
        steps: of the optimiser.
        interval: steps between two measurements of the held-out divergence, each with a checkpoint.
        learning_rate: the largest.
        batch_size: windows of a step, in all processes.
        at_once: windows that pass through the model together.
        seed: of the order of the windows.
        precision: of the matrix products.
    """

    steps: int
    interval: int
    learning_rate: float
    batch_size: int
    at_once: int
    seed: int
    precision: torch.dtype


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training came to.

    Args:
        divergences: step -> held-out divergence; step 0 is the start.
        kept: the step whose weights the model has; 0 where none was better than the start, whose weights it has not.
    """

    divergences: dict[int, float]
    kept: int


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells of steps and measurements, and stops at the end of a step where that is asked for.

    Args:
        step: called after every step.
        tell: told every measurement in words.
    """

    def __init__(self, step: Callable[[], None], tell: Callable[[str], None]) -> None:
        self.step, self.tell = step, tell
        self.stop = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self.step()
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        elif self.stop:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Tell a measurement."""
        self.tell(f"step {state.global_step}: held-out divergence {metrics['eval_loss']:.4f}")
        if self.stop and not state.global_step:
            raise KeyboardInterrupt


@contextmanager
def _stopping_late(watch: Watch) -> Iterator[None]:
    """Within, the first interruption ends the training behind the step that runs, with a checkpoint.

    Several processes would not end behind the same step: there, as outside of the main thread, it ends at once.
    """
    if PartialState().num_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if watch.stop:
            raise KeyboardInterrupt
        watch.stop = True
        watch.tell("stopping behind this step, with a checkpoint; interrupt again to stop at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    model: Distilled,
    windows: tuple[Tensor, Tensor],
    zeros: Collection[str],
    schedule: Schedule,
    folder: Path,
    resume: Path | None,
    watch: Watch,
) -> Outcome:
    """Train a student; it has the weights with the least held-out divergence afterwards.

    Args:
        model: the student with its teachers; parameters without `requires_grad` stay as they are.
        windows: to train on, and held out, `(windows, length)`, int64.
        zeros: names of the student's parameters whose zeros are kept.
        schedule: of the training.
        folder: of the checkpoints.
        resume: the checkpoint to go on from; None to start.
        watch: told of steps and measurements.

    Raises:
        KeyboardInterrupt: it was interrupted; there is a checkpoint of its last step.
    """
    arguments = _arguments(schedule, folder, next(model.parameters()).device, start=resume is None)
    keep = [KeepZeros(parameters=[f"student.{name}" for name in zeros])] if zeros else []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=windows_of(windows[0]),
        eval_dataset=windows_of(windows[1]),
        callbacks=[*keep, watch],
    )
    trainer.remove_callback(PrinterCallback)
    with _stopping_late(watch):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if watch.stop and trainer.state.global_step < schedule.steps:
        raise KeyboardInterrupt
    log = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = trainer.state.best_metric
    better = best is not None and best < log[0]
    return Outcome(log, int(trainer.state.best_global_step) if better else 0)


def _arguments(schedule: Schedule, folder: Path, device: torch.device, start: bool) -> TrainingArguments:
    """The settings of the trainer, which joins the processes that have met already; alone, this one says so itself."""
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    processes = int(PartialState(cpu=device.type == "cpu").num_processes)
    found = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.at_once,
        per_device_eval_batch_size=schedule.at_once,
        gradient_accumulation_steps=schedule.batch_size // (schedule.at_once * processes),
        learning_rate=schedule.learning_rate,
        optim=OPTIMIZER,
        weight_decay=0.0,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=max(round(WARM_UP * schedule.steps), 1),
        bf16=schedule.precision == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=schedule.seed % 2**32,
        eval_strategy="steps",
        eval_steps=schedule.interval,
        eval_on_start=start,
        save_strategy="steps",
        save_steps=schedule.interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_strategy="no",
        label_names=["input_ids"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"use_configured_state": True},
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    found._n_gpu = min(found.n_gpu, 1)
    return found
