"""Resolves a job to a procedure: which sparsity, method, criterion, recipe and flags fit together."""

from __future__ import annotations

from dataclasses import replace

from llmprune.errors import InputError
from llmprune.job import Job
from llmprune.pipeline.context import Procedure
from llmprune.pruning.blocks import BLOCK_CRITERIA, BlockCriterion, load_block_criterion
from llmprune.pruning.criteria import CRITERIA, Criterion, load_criterion
from llmprune.pruning.experts import EXPERT_CRITERIA, ExpertCriterion, load_expert_criterion
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.methods import METHODS, load_method
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.recipe import AUTO, Recipe
from llmprune.pruning.sparsity import Sparsity, parse_sparsity
from llmprune.pruning.structured_solver import StructuredSolver
from llmprune.runtime.process_group import SINGLE, ProcessGroup

REMOVING = {*CRITERIA, *EXPERT_CRITERIA, *BLOCK_CRITERIA}


def resolve(job: Job, group: ProcessGroup = SINGLE) -> Procedure:
    """The procedure that a job asks for.

    Raises:
        InputError: method, options or flags do not fit what is to go.
    """
    sparsity, grid = parse_sparsity(job.sparsity), job.grid
    if not sparsity and grid is None:
        raise InputError("--sparsity none leaves nothing to be done", "add --quantize int4, or name a pattern")
    _check_method(job, sparsity)
    recipe, options = job.recipe, dict(job.options)
    criterion, experts, blocks, for_criterion = _criteria(job, sparsity, recipe)
    method = load_method(recipe.method, {} if for_criterion else options) if sparsity.pattern else None
    if method is not None:
        # Of a layer that loses rows later, a count over rows alone stays exact.
        sparsity = parse_sparsity(job.sparsity, job.scope or ("row" if sparsity.narrows else method.scope))
    if job.scope and sparsity.scope != job.scope:
        raise InputError(
            f"--scope {job.scope} does not apply to {sparsity.name}",
            "leave it out: it is for unstructured ratios such as 50%",
        )
    if sparsity.narrows and job.scope == "layer":
        raise InputError("--scope layer cannot be exact where rows are removed", "use --scope row")
    if sparsity.removals and sparsity.pattern is None and grid is None and (job.only or job.skip):
        raise InputError(
            f"--only and --skip do not apply to {sparsity.name}",
            "a config has one number of blocks, and one width, one number of heads and one of experts for all",
        )
    if job.round_to and not any(removal.kind == "channels" for removal in sparsity.removals):
        raise InputError(f"--round-to does not apply to {sparsity.name}", "it is for channels:...")
    recipe = applicable(recipe, job, sparsity)
    sharding = RowSharding(group)
    repairs = sparsity.blocks is not None and recipe.compensate
    inner = LayerSolver(method, recipe, sharding) if method or grid or repairs else None
    if inner is not None and not sparsity.narrows:
        return Procedure(sparsity, recipe, inner, sharding, experts, grid, blocks)
    solver = StructuredSolver(criterion, recipe, inner, sharding)
    return Procedure(sparsity, recipe, solver, sharding, experts, grid, blocks)


def _criteria(
    job: Job, sparsity: Sparsity, recipe: Recipe
) -> tuple[Criterion | None, ExpertCriterion | None, BlockCriterion | None, bool]:
    """The criteria of what is removed, and whether the options are theirs.

    Options are those of the method that was named; of a pair, the method of the weights.
    """
    options = dict(job.options)
    for_criterion = sparsity.pattern is None or (job.method in REMOVING and job.method not in METHODS)
    for_experts = for_criterion and (not sparsity.narrows or job.method not in {AUTO, *CRITERIA})
    for_blocks = for_experts and (not sparsity.drops_experts or job.method in BLOCK_CRITERIA)
    criterion = experts = blocks = None
    if sparsity.narrows:
        criterion = load_criterion(recipe.criterion, options if for_criterion and not for_experts else {})
    if sparsity.drops_experts:
        experts = load_expert_criterion(recipe.expert_criterion, options if for_experts and not for_blocks else {})
    if sparsity.blocks:
        blocks = load_block_criterion(recipe.block_criterion, options if for_blocks else {})
    return criterion, experts, blocks, for_criterion


def _check_method(job: Job, sparsity: Sparsity) -> None:
    if (
        job.method == AUTO
        or (job.method in METHODS and sparsity.pattern)
        or (job.method in CRITERIA and sparsity.narrows)
        or (job.method in EXPERT_CRITERIA and sparsity.drops_experts)
        or (job.method in BLOCK_CRITERIA and sparsity.blocks)
    ):
        return
    if not sparsity:
        raise InputError(
            f"--method {job.method} does not apply to --sparsity {sparsity.name}: no weight is pruned",
            "leave it out: --effort says how weights are quantised",
        )
    tables = {"rule for single weights": METHODS if sparsity.pattern else {}}
    tables["rule for whole blocks"] = BLOCK_CRITERIA if sparsity.blocks else {}
    tables["score for whole experts"] = EXPERT_CRITERIA if sparsity.drops_experts else {}
    tables["score for whole channels and heads"] = CRITERIA if sparsity.narrows else {}
    known = list(dict.fromkeys(name for table in tables.values() for name in table))
    what = [words for words, table in tables.items() if table][-1]
    raise InputError(
        f"--method {job.method} has no {what}, as {sparsity.name} needs", f"choose from {', '.join(known)}"
    )


def applicable(recipe: Recipe, job: Job, sparsity: Sparsity) -> Recipe:
    """The recipe without what has no meaning for this pattern; refused if the user asked for it by name."""
    recipe = _applicable(recipe, job, sparsity)
    return recipe if sparsity.blocks is None else _for_blocks(recipe, job, sparsity)


def _for_blocks(recipe: Recipe, job: Job, sparsity: Sparsity) -> Recipe:
    """The recipe where whole blocks go: the others compensate towards the dense model's stream, or nothing does."""
    if job.allocate not in {None, "uniform"}:
        raise InputError(
            f"--allocate {job.allocate} does not apply to {sparsity.name}",
            "leave it out: remove blocks first, then prune the folder that results",
        )
    if job.targets == "pruned" and recipe.compensate:
        raise InputError(
            f"--targets pruned does not apply to {sparsity.name}",
            "what removed blocks did is known from the dense model only; leave it out, or add --no-refit",
        )
    return replace(recipe, allocate="uniform", targets="dense" if recipe.compensate else recipe.targets)


def _applicable(recipe: Recipe, job: Job, sparsity: Sparsity) -> Recipe:
    pattern = sparsity.pattern
    if job.permute and not (pattern and pattern.permutable):
        raise InputError(f"--permute does not apply to {sparsity.name}", "leave it out: it is for N:M patterns")
    if job.allocate not in {None, "uniform"} and not (pattern and pattern.allocatable):
        all_alike = f"leave it out: {pattern.name} prunes the same in every group of every layer" if pattern else ""
        raise InputError(
            f"--allocate {job.allocate} does not apply to {sparsity.name}",
            all_alike or "a config has one width and one number for all",
        )
    if job.grid_passes is not None and job.grid is None:
        raise InputError(f"--grid-passes {job.grid_passes} does not apply", "leave it out, or add --quantize")
    if job.grid is None:
        recipe = replace(recipe, grid_passes=0)
    if job.guard is not None and not sparsity.drops_experts:
        raise InputError(
            f"--{'' if job.guard else 'no-'}guard does not apply to {sparsity.name}",
            "leave it out: it is for experts:...",
        )
    if pattern is not None:
        return replace(
            recipe,
            permute=recipe.permute and pattern.permutable,
            allocate=recipe.allocate if pattern.allocatable else "uniform",
            steps=recipe.steps if sparsity.narrows else len(pattern.steps(recipe.steps)),
        )
    if recipe.steps > 1 and not sparsity.narrows:
        raise InputError(f"--steps {recipe.steps} does not apply to {sparsity.name}", "leave it out")
    if not sparsity.removals:
        return replace(recipe, permute=False, allocate="uniform", refit=False)
    if job.ridge:
        raise InputError(
            f"--ridge {job.ridge:g} does not apply to {sparsity.name}", "leave it out: held-out tokens choose the ridge"
        )
    return _for_removal(replace(recipe, permute=False), job)


def _for_removal(recipe: Recipe, job: Job) -> Recipe:
    """The recipe where blocks, channels, heads or experts go and no weights after that: one fit, or none."""
    if not recipe.compensate and job.targets == "dense":
        raise InputError("--targets dense has no meaning with --no-refit", "leave one of them out: nothing is fitted")
    targets = recipe.targets if recipe.compensate else "pruned"
    return replace(recipe, allocate="uniform", refit=False, targets=targets)
