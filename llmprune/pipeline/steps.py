"""The steps of a run, as every process takes them: tokens, patterns, the stream, evaluation, checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import CheckError, InputError
from llmprune.export.verify import check_layers, grids_of, patterns_of
from llmprune.export.verify_grid import off_grid
from llmprune.model.blocks import find_layers
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.selection import make_plan
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.allocation import allocate
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.evaluation import measured
from llmprune.pipeline.quantized_form import open_quantized
from llmprune.pipeline.state import GENERATED, names_of, parsed
from llmprune.progress import Progress
from llmprune.pruning.experts.problem import Choice, super_experts
from llmprune.pruning.experts.refit import refit
from llmprune.pruning.grid import Grid
from llmprune.pruning.linalg import clamped_ratio, error_terms
from llmprune.pruning.pattern import SparsityPattern
from llmprune.reporting.report import FILE as REPORT
from llmprune.reporting.report import BlockReconstruction, MixtureReport, PruneReport
from llmprune.runtime.oom import with_oom_retry
from llmprune.sources.generated import generated_batch
from llmprune.sources.tokens import TokenBatch, load_tokens, save_tokens, token_batch
from llmprune.streaming.block import Block
from llmprune.streaming.block_reconstruction import Peers, batch_tokens, reconstruct_block
from llmprune.streaming.check_stream import check_stream
from llmprune.streaming.expert_removal import FewerExperts
from llmprune.streaming.perplexity import Perplexity
from llmprune.streaming.schedule import Group
from llmprune.streaming.stream import BATCH_TOKENS, BlockStream, Observe, Resources

GENERATOR = "the dense model"


def check_weights(run: RunContext, progress: Progress) -> str:
    """Read every weight once, so that a damaged file is found now and not after hours.

    Returns:
        the sha256 of all weights.

    Raises:
        InputError: they are damaged, or zeros are missing of a source whose zeros are to be held.
    """
    progress.start("checking weights", run.skeleton.checkpoint.folder.nbytes, "B")
    skeleton, chosen = run.skeleton, run.chosen
    pruned = {
        layer.parameter
        for index, block in enumerate(skeleton.blocks)
        for layer in find_layers(block, skeleton.block_name(index), skeleton.config)
        if layer.name in chosen
    }
    digest = skeleton.checkpoint.check_finite(progress.step, pruned)
    progress.finish()
    _check_held(run)
    return digest


def _check_held(run: RunContext) -> None:
    """Refuse a pruned source that lost zeros since its report was written, such as by a fine-tune."""
    patterns = patterns_of(run.held) if run.held else {}
    layers = [(layer, patterns[layer.name]) for layer in run.plan.layers if layer.name in patterns]
    for check in check_layers(run.skeleton.checkpoint, layers):
        if check.violations:
            raise InputError(
                f"{check.name!r} misses {check.violations} zeros of {patterns[check.name].name}, which "
                f"{REPORT} in {run.source.folder} says that it holds",
                f"prune it again, or remove its {REPORT} to quantise it as it is",
            )


def compare_with_whole(run: RunContext, progress: Progress) -> None:
    """Check that one short window comes out of the stream as it does out of the whole model."""
    progress.start("checking the stream", len(run.skeleton.blocks))
    tokens, scores = run.data.calibration.tokens, run.data.evaluation is not None
    # One window is the least there is; what is caught here is that even it is too much.
    with_oom_retry(lambda _: check_stream(run.skeleton, tokens, scores, progress.step), 1, progress)
    progress.finish()


def generated_tokens(run: RunContext, progress: Progress) -> TokenBatch | None:
    """The calibration windows that the dense model generates, the same in all processes; None for none.

    Rank 0 generates them. They are kept with the finished blocks: another machine, or another load, may draw others.
    """
    windows, kept = run.generated_windows, run.workdir / GENERATED
    if not windows:
        return None
    length = run.shape[1]
    tokens = torch.zeros(windows, length, dtype=torch.int64)
    if run.group.is_main:
        found: TokenBatch | None = None
        with suppress(InputError):
            found = load_tokens(kept, windows, length, run.source.config.get_text_config().vocab_size)
        if found is None:
            found = generated_batch(run.skeleton, run.data.calibration, windows, (run.job.seed, GENERATOR), progress)
            save_tokens(found, kept)
        tokens = found.tokens
    tokens = tokens.to(run.group.device)
    run.group.broadcast([tokens])
    return token_batch(tokens.cpu(), GENERATOR, run.job.seed, run.data.calibration.bos_tokens)


def calibration_windows(run: RunContext, generated: TokenBatch | None) -> Tensor:
    """All calibration windows, `(windows, length)`, self-generated ones shuffled among those of the text."""
    text = run.data.calibration.tokens
    if generated is None:
        return text
    both = torch.cat([text, generated.tokens])
    # Held-out tokens are then of both kinds.
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(run.job.seed))]


def calibration_batch_size(run: RunContext) -> int:
    """Number of calibration windows that pass through a block together, if memory suffices."""
    windows, length = run.shape
    most = batch_tokens(windows * length) if run.recipe.reconstruct else BATCH_TOKENS
    return min(max(most // length, 1), windows)


def block_stream(
    run: RunContext, windows: Tensor, at_once: int, saved: Sequence[dict[str, Any]], rows: Sequence[int]
) -> BlockStream:
    """The stream of this process's windows through the blocks.

    Args:
        run: the job.
        windows: all calibration windows, `(windows, length)`.
        at_once: number of windows that pass through a block together.
        saved: for every process, what its stream saved in a run that was stopped; only rank 0 must know.
        rows: number of rows that every process had solved then.
    """
    saved = run.group.broadcast_object(list(saved))
    run.procedure.sharding.rows[:] = run.group.broadcast_object(list(rows)) or [0] * run.group.world_size
    resources = Resources(
        batch_tokens=at_once * windows.shape[1],
        hidden_memory=run.job.activation_memory,
        folder=run.rank_workdir,
        group=run.group,
        saved=saved[run.group.rank] if saved else None,
    )
    return BlockStream(run.skeleton, windows, observed(run), resources)


def observed(run: RunContext) -> Observe:
    """What the stream of a run observes."""
    recipe, solver = run.recipe, run.solver
    return Observe(
        chosen=run.chosen,
        dense_stream=recipe.dense_stream,
        dense_targets=recipe.targets == "dense",
        permute=recipe.permute,
        removed=run.structure.by_name,
        needs=solver.needs,
        zero_threshold=solver.zero_threshold,
        shrink=recipe.shrinkage,
        reconstruct=recipe.reconstruct > 0,
        experts=_fewer_experts(run),
        removed_blocks=run.removed_blocks,
    )


def _fewer_experts(run: RunContext) -> FewerExperts | None:
    mixtures = run.structure.mixtures
    return None if mixtures is None else FewerExperts(mixtures, run.skeleton.blocks_of(mixtures.config))


def block_patterns(
    run: RunContext, windows: Tensor, at_once: int, known: Sequence[SparsityPattern | None], progress: Progress
) -> Sequence[SparsityPattern | None]:
    """The pattern of every block: the one asked for, or with a ratio of its own from a pass over the dense model.

    Args:
        run: the job.
        windows: all calibration windows, `(windows, length)`.
        at_once: number of windows that pass through a block together.
        known: the patterns, if rank 0 knows them from a run that was stopped.
        progress: of the pass.
    """
    pattern = run.pattern
    if run.recipe.allocate == "uniform" or pattern is None:
        return [pattern] * len(run.skeleton.blocks)
    if names := run.group.broadcast_object(names_of(known)):
        return parsed(names, pattern.scope)
    # An attempt that ran out of memory may have counted rows in some processes and not in others.
    run.procedure.sharding.rows[:] = [0] * run.group.world_size
    progress.start("allocating sparsity", len(run.skeleton.blocks))
    with TemporaryDirectory(dir=run.rank_workdir, ignore_cleanup_errors=True) as spare:
        resources = Resources(at_once * windows.shape[1], None, run.job.activation_memory, Path(spare), run.group)
        observe = Observe(run.plan.names, needs=run.solver.needs)
        stream = BlockStream(run.skeleton, windows, observe, resources)
        patterns = allocate(stream, pattern, run.recipe.allocate, run.solver, progress.step)
    progress.finish()
    return parsed(run.group.broadcast_object(names_of(patterns)), pattern.scope)


def grid_for(run: RunContext, group: Group) -> Grid | None:
    """The grid of a group's weights: None where its layer only loses inputs."""
    return run.grid if group.refs[0].name in run.plan.names else None


def pattern_for(run: RunContext, group: Group, pattern: SparsityPattern | None) -> SparsityPattern | None:
    """The pattern of a group's weights: None where its layer only loses inputs."""
    return pattern if group.refs[0].name in run.plan.names else None


def errors_of(run: RunContext, group: Group, stored: Sequence[Tensor]) -> list[float]:
    """The relative output errors of a group's layers with the weights as stored, every process its own rows."""
    parts = [run.group.own_rows(len(weight)) for weight in stored]
    sums = [
        error_terms(layer.weight, weight, group.problem.stats, rows)
        for layer, weight, rows in zip(group.problem.layers, stored, parts, strict=True)
    ]
    totals = iter(run.group.sum([value for pair in sums for value in pair]))
    return [clamped_ratio(error, next(totals)) for error in totals]


def remove_experts(run: RunContext, stream: BlockStream, block: Block) -> list[MixtureReport]:
    """Remove whole experts from a block, and refit the output projections of the others; none where it loses none."""
    removal, criterion = stream.experts(block), run.procedure.experts
    if removal is None or criterion is None:
        return []
    use, cut = removal.use(), removal.cut
    found = super_experts(use)
    guarded = found if run.recipe.guard else torch.zeros_like(found)
    kept = criterion.select(use, Choice(cut.count - cut.kept, cut.groups, guarded))
    removal.remove(torch.tensor(run.group.broadcast_object(kept.tolist())))
    problem = removal.problem()
    error = before = removal.relative(problem.residual)
    fit = None
    if run.recipe.compensate:
        fit = refit(problem, run.group)
        run.group.broadcast(fit.changes)
        error = removal.write(fit.changes)
    return [
        MixtureReport(
            block=block.name,
            experts=cut.count,
            kept=kept.tolist(),
            super_experts=found.nonzero().flatten().tolist(),
            tokens=[int(number) for number in use.tokens],
            error_uncompensated=before,
            error=error,
            ridge=fit.ridge if fit and fit.ridge < math.inf else None,
            retries=fit.retries if fit else 0,
        )
    ]


def reconstruct(run: RunContext, stream: BlockStream, block: Block) -> list[BlockReconstruction]:
    """Reconstruct a block whose groups are all solved, if the recipe says so."""
    if not run.recipe.reconstruct:
        return []
    peers = Peers(run.group, stream.sharding.batches)
    # Where whole blocks are removed, those that stay compensate with all they have.
    return [reconstruct_block(block, peers, run.recipe.reconstruct, run.job.seed, whole=bool(run.removed_blocks))]


def evaluate(run: RunContext, folder: Path, label: str, progress: Progress) -> Perplexity | None:
    """The perplexity of the model in `folder`; None if the job does not ask for it."""
    if run.data.evaluation is None:
        return None
    memory = run.job.activation_memory
    return measured(skeleton_of(run, folder), run.data.evaluation, run.workdir, memory, (progress, label))


def skeleton_of(run: RunContext, folder: Path) -> Skeleton:
    """The skeleton of the model in `folder`, dense or pruned, computing as the run does."""
    dense = folder == run.source.folder
    return Skeleton(
        run.source.config if dense else run.config,
        run.skeleton.checkpoint.folder if dense else weights_of(run, folder),
        compute=run.skeleton.compute,
        device=run.skeleton.device,
        trust_remote_code=run.job.trust_remote_code,
    )


def weights_of(run: RunContext, folder: Path) -> SafetensorsFolder:
    """The tensors of the pruned model in `folder`, in floating point."""
    return SafetensorsFolder(folder) if run.grid is None else open_quantized(folder, run.grid)


def verify_written(run: RunContext, report: PruneReport, progress: Progress) -> None:
    """Re-open the written files, check all shapes against the config, and the pattern of every pruned layer.

    Raises:
        CheckError: a layer misses zeros.
    """
    patterns, written = patterns_of(report), skeleton_of(run, run.unfinished)
    refs = run.plan.layers
    if run.structure.kept_blocks is not None and patterns:
        refs = make_plan(written, None, names=tuple(patterns)).layers
    layers = [(ref, patterns[ref.name]) for ref in refs if ref.name in patterns]
    progress.start("verifying", len(layers))
    checks = check_layers(written.checkpoint, layers, progress.step)
    progress.finish()
    if bad := [check for check in checks if check.violations]:
        raise CheckError(f"{bad[0].name!r} misses {bad[0].violations} zeros of {run.sparsity.name}", "please report it")
    if run.grid is not None:
        skeleton = skeleton_of(run, run.unfinished)
        if wrong := off_grid(run.unfinished, skeleton.checkpoint, grids_of(report, skeleton)):
            raise CheckError(f"a layer is not on the grid {run.grid.name}: {wrong[0]}", "please report it")
