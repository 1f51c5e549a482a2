"""An effort sets all stages; a method by name stands alone; flags win over both."""

from __future__ import annotations

import pytest

from llmprune.job import Job
from llmprune.pipeline.resolve import resolve
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT, EFFORTS, Recipe, make_recipe
from llmprune.pruning.structured_solver import StructuredSolver


@pytest.mark.parametrize("effort", EFFORTS)
def test_auto_is_what_the_effort_stands_for(effort: str) -> None:
    assert make_recipe(AUTO, effort, {}) == EFFORTS[effort]
    assert EFFORTS[effort].method in METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_by_name_stands_alone(method: str) -> None:
    assert make_recipe(method, "best", {"reconstruct": None}) == Recipe(method)


def test_flags_win() -> None:
    assert make_recipe("wanda", "fast", {"refit": True, "targets": None}) == Recipe("wanda", refit=True)
    assert make_recipe(AUTO, "best", {"reconstruct": 0}).reconstruct == 0
    assert make_recipe(AUTO, "best", {"reconstruct": 0}).method == EFFORTS["best"].method


def test_efforts_rise() -> None:
    assert list(EFFORTS) == ["fast", "balanced", "best"]
    assert DEFAULT_EFFORT in EFFORTS
    assert not EFFORTS["fast"].dense_stream
    assert EFFORTS["best"].reconstruct > EFFORTS["balanced"].reconstruct == 0


def test_a_recipe_says_all_its_stages() -> None:
    assert Recipe("wanda").describe() == "wanda"
    everything = Recipe(
        "admm", targets="dense", permute=True, steps=3, ridge=0.3, refit=True, reconstruct=2, self_calibration=0.5
    )
    stages = [
        "admm",
        "dense targets",
        "permuted channels",
        "3 steps",
        "ridge 0.3",
        "refit",
        "block-wise reconstruction x2",
    ]
    assert everything.describe() == " + ".join([*stages, "self-calibration x0.5"])


@pytest.mark.parametrize(("sparsity", "asked", "done"), [("2:4", 100, 2), ("4:8", 3, 3), ("50%", 3, 3)])
def test_steps_are_those_that_the_pattern_has(sparsity: str, asked: int, done: int) -> None:
    job = Job("model", sparsity, steps=asked)
    recipe = resolve(job).recipe
    assert recipe.steps == done


def test_steps_of_a_removal_are_not_those_of_the_pattern_behind_it() -> None:
    procedure = resolve(Job("model", "channels:25%+2:4", steps=3))
    recipe = procedure.recipe
    assert recipe.steps == 3
    assert isinstance(procedure.solver, StructuredSolver)
    assert procedure.solver.recipe.steps == 3


@pytest.mark.parametrize(
    ("sparsity", "method", "effort", "label"),
    [
        ("2:4", "auto", "best", "best"),
        ("2:4", "wanda", None, "wanda"),
        ("channels:25%", "obs", None, "obs"),
        ("channels:25%+2:4", "auto", "best", "best"),
        ("channels:25%+2:4", "obs", "best", "obs-best"),
        ("channels:25%+2:4", "sparsegpt", None, "sparsegpt"),
        ("channels:25%+2:4", "wanda", None, "wanda"),
    ],
)
def test_an_effort_is_named_where_it_sets_stages(sparsity: str, method: str, effort: str | None, label: str) -> None:
    job = Job("model", sparsity, method=method, effort="best")
    assert (job.effective_effort, job.label) == (effort, label)
    changes = Job("model", sparsity, method=method, effort="fast").recipe != job.recipe
    assert changes == (effort is not None)
