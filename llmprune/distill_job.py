"""What the user asks of a distillation: every setting is a field of `DistillJob`, described once, where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmprune.job import Job
from llmprune.knobs import ABOVE_ZERO, COUNT, FRACTION, PATH, PRECISION, REQUIRED, SWITCH, TEXT, knob, knobs_of, same

RECIPE = "recipe"
GROUPS = {
    "model": "models",
    "data": "text to train and to measure on",
    RECIPE: "how to train",
    "output": "output",
    "machine": "machine",
}
"""The groups of settings, in the order in which they are listed, and their titles."""


@dataclass(frozen=True, slots=True)
class DistillJob:
    """One distillation; every field but `folder` and `command` is a flag of `llmprune distill`."""

    folder: Path = knob(REQUIRED, "model", "pruned folder, which stays as it is", PATH)
    teacher: str | None = knob(
        None,
        "model",
        "the dense model: folder, Hub id, .gguf file, or demo",
        TEXT,
        metavar="MODEL",
        default_text="what the folder's report names",
        guesses=("model", "dense", "base_model", "teacher_model"),
    )
    revision: str | None = same(Job, "revision")
    trust_remote_code: bool = same(Job, "trust_remote_code")
    tokens: int = knob(
        500_000, "data", "tokens of text to train on", COUNT, unit="tokens", guesses=("max_tokens", "train_tokens", "n")
    )
    calib: str | None = same(Job, "calib", help="text to train on: as of llmprune --calib")
    seq_len: int | None = same(Job, "seq_len", help="tokens per window")
    bos: str = same(Job, "bos")
    seed: int = same(Job, "seed", help="random choice and order of windows")
    generated: float = knob(
        0.0,
        "data",
        "fraction of the windows that the teacher generates, prompted with pieces of the text",
        FRACTION,
        guesses=("self_calibration", "self_generated", "synthetic"),
    )
    held_out: int = knob(
        16,
        "data",
        "windows of the text that are not trained on; the divergence on them says which weights are kept",
        COUNT,
        unit="windows",
        guesses=("validation", "val_windows", "eval_samples"),
    )
    evaluate: bool = same(Job, "evaluate")
    eval_text: str | None = same(Job, "eval_text")
    eval_windows: int = same(Job, "eval_windows")
    eval_context: int | None = same(Job, "eval_context")
    learning_rate: float = knob(
        1e-4, RECIPE, "largest learning rate; warm-up, then a cosine to 0", ABOVE_ZERO, guesses=("lr",)
    )
    temperature: float = knob(
        1.0, RECIPE, "both distributions are softened by it", ABOVE_ZERO, guesses=("t", "tau", "kd_temperature")
    )
    mix: float = knob(
        0.0,
        RECIPE,
        "weight of the text's own next tokens in the loss; the teacher's distribution has the rest",
        FRACTION,
        guesses=("alpha", "ce_weight", "hard_weight", "lambda"),
    )
    epochs: int = knob(
        1, RECIPE, "passes over the windows", COUNT, guesses=("num_train_epochs", "num_epochs", "passes")
    )
    batch_size: int = knob(
        4,
        RECIPE,
        "windows of an optimiser step, in all processes",
        COUNT,
        unit="windows",
        guesses=("batch", "train_batch_size", "per_device_train_batch_size"),
    )
    top_k: int = knob(
        64,
        RECIPE,
        "with more than one pass, so many of the teacher's largest probabilities of every token are kept for all of "
        "them, which is cheaper than to run it again",
        COUNT,
        unit="tokens of the vocabulary",
        guesses=("k", "topk"),
    )
    freeze: tuple[str, ...] = knob(
        (),
        RECIPE,
        "leave parameters as they are whose name matches, such as '*embed*'",
        TEXT,
        metavar="GLOB",
        repeatable=True,
        guesses=("frozen", "freeze_layers", "skip"),
    )
    evaluations: int = knob(
        10,
        RECIPE,
        "times that the held-out divergence is measured, each with a checkpoint",
        COUNT,
        guesses=("eval_steps", "save_steps", "checkpoints"),
    )
    out: Path | None = same(Job, "out", default_text="DIR-distilled")
    restart: bool = same(Job, "restart", help="drop the work of a stopped distillation instead of going on from it")
    precision: str | None = knob(
        None,
        "machine",
        "type of the matrix products; weights and optimiser stay float32",
        PRECISION,
        default_text="float32 on a CPU, else bfloat16",
        guesses=("dtype", "mixed_precision", "bf16=bfloat16", "fp32=float32", "amp=bfloat16"),
    )
    at_once: int | None = knob(
        None,
        "machine",
        "windows that a process passes through the models together",
        COUNT,
        unit="windows",
        default_text="up to 2 on a CPU, else 8",
        guesses=("micro_batch", "micro_batch_size", "per_device_batch_size"),
    )
    gradient_checkpointing: bool = knob(
        False,
        "machine",
        "recompute activations in the backward pass: less memory, a third more time",
        SWITCH,
        guesses=("checkpointing", "recompute"),
    )
    device: str = same(Job, "device")
    threads: int | None = same(Job, "threads")
    activation_memory: int = same(Job, "activation_memory")
    cache_dir: Path | None = same(Job, "cache_dir")
    command: str = ""

    def __post_init__(self) -> None:
        """Replace every value by the one that it stands for.

        Raises:
            InputError: a value is outside its knob's range.
        """
        for each in knobs_of(type(self)):
            object.__setattr__(self, each.name, each.read(getattr(self, each.name)))
