"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS
from llmprune.pruning.pattern import Scope
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT, Allocate, Recipe, Targets, make_recipe
from llmprune.pruning.sparsity import parse_sparsity

STAGES = ("targets", "permute", "steps", "ridge", "refit", "reconstruct", "self_calibration", "allocate")


@dataclass(frozen=True, slots=True)
class Job:
    """One pruning run; the fields are the command line's flags.

    Args:
        model: folder, Hub id, `.gguf` file or `demo`.
        sparsity: `2:4`, `50%`, `0.5`, `channels:25%`, `heads:33%`, or several with `+` between.
        method: a name of the METHODS or the CRITERIA table, or `auto` for what `effort` stands for.
        effort: `fast`, `balanced` or `best`; counts where `method` leaves stages to it, see `effective_effort`.
        options: the method's own options, as pairs of text such as `("damping", "0.03")`.
        targets, permute, steps, ridge, refit, reconstruct, self_calibration, allocate: fields of a `Recipe`; None for
            the effort's, or for those of a plain method.
        round_to: the number of channels that stay is a multiple of this; None for 64, or less in a tiny model.
        scope: where an unstructured count is exact; None for the method's own.
        calib: text file or folder, token file, or data set name; None for `sotu` with the demo model, else `c4`.
        samples: calibration windows; None for 128, or for all of a token file.
        seq_len: tokens per calibration window; None for 512, or for those of a token file.
        seed: of the random choice of windows.
        out: folder to be made; None for a name made of model, method and sparsity.
        overwrite: whether a folder that is there may be replaced.
        restart: whether finished blocks that a stopped run left are dropped; else the run goes on from them.
        only, skip: globs over layer names.
        dtype: stored type (`float32`, `float16`, `bfloat16`); None for the source's.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        threads: CPU threads; None for all.
        activation_memory: bytes of hidden states that may rest in memory; more than that rests in files.
        evaluate: whether perplexity is measured.
        eval_text: text to measure on; None for `sotu` with the demo model, else `wikitext2`.
        eval_windows: number of evaluation windows.
        eval_context: tokens per evaluation window; None for 1024, or the model's positions if it has fewer.
        revision: branch, tag or commit of a Hub model.
        cache_dir: where converted models and demo data are kept.
        trust_remote_code: whether code that comes with the model may run.
        command: what the report calls the command.
    """

    model: str
    sparsity: str
    method: str = AUTO
    effort: str = DEFAULT_EFFORT
    options: tuple[tuple[str, str], ...] = ()
    targets: Targets | None = None
    permute: bool | None = None
    steps: int | None = None
    ridge: float | None = None
    refit: bool | None = None
    reconstruct: int | None = None
    round_to: int | None = None
    self_calibration: float | None = None
    allocate: Allocate | None = None
    scope: Scope | None = None
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False
    restart: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "auto"
    threads: int | None = None
    activation_memory: int = 2 * 2**30
    evaluate: bool = True
    eval_text: str | None = None
    eval_windows: int = 20
    eval_context: int | None = None
    revision: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False
    command: str = ""

    @property
    def recipe(self) -> Recipe:
        """What is done to every layer and block, defaults applied."""
        flags = {name: getattr(self, name) for name in STAGES}
        goal = parse_sparsity(self.sparsity)
        if not goal.removals:
            return make_recipe(self.method, self.effort, flags)
        method = self.method if self.method in METHODS else AUTO
        criterion = self.method if self.method in CRITERIA else AUTO
        return make_recipe(method if goal.pattern is not None else "", self.effort, flags, criterion)

    def at(self, effort: str) -> Job:
        """The same job at an effort."""
        return replace(self, method=AUTO, effort=effort)

    @property
    def effective_effort(self) -> str | None:
        """The effort, where it sets stages; None where a method by name stands in their place.

        Of a removal with a pattern behind it, a criterion by name leaves the stages of the pattern to the effort.
        """
        goal = parse_sparsity(self.sparsity)
        left = bool(goal.removals) and goal.pattern is not None and self.method not in METHODS
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
