"""Chooses the blocks that a run removes, before the others are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from llmprune.model.selection import NOTHING_TO_LOSE
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.state import WorkerState
from llmprune.progress import Progress
from llmprune.runtime.foreign import read_json
from llmprune.runtime.oom import with_oom_retry
from llmprune.streaming.block_use import TOKENS, block_use, longest_run
from llmprune.streaming.stream import BATCH_TOKENS, BlockStream, Observe, Resources
from llmprune.structure.fewer_blocks import keep_blocks
from llmprune.structure.written_config import check_written

NOTHING_TO_FIT = "not fitted: it does not add to the residual stream"


def choose_blocks(run: RunContext, windows: Tensor, state: WorkerState, progress: Progress) -> RunContext:
    """The run with its blocks chosen; as it is where none are removed.

    Every process does the same on the same few windows; what rank 0 found counts.

    Args:
        run: the job; so many of its last blocks are marked as removed.
        windows: all calibration windows, `(windows, length)`.
        state: knows the choice of a run that was stopped, and is told a new one.
        progress: of the pass over the dense model.

    Raises:
        InputError: the config cannot express the blocks that are left.
    """
    criterion, count = run.procedure.blocks, len(run.removed_blocks)
    if criterion is None:
        return run
    state.block_choice = run.group.broadcast_object(state.block_choice)
    if not state.block_choice:
        length = windows.shape[1]
        sample = windows[: max(TOKENS // length, 2)]

        def attempt(at_once: int) -> dict[str, list[int] | list[str]]:
            progress.start("choosing blocks", len(run.skeleton.blocks))
            with TemporaryDirectory(dir=run.rank_workdir, ignore_cleanup_errors=True) as spare:
                resources = Resources(at_once * length, None, run.job.activation_memory, Path(spare))
                stream = BlockStream(run.skeleton, sample, Observe(run.plan.names), resources)
                use, adders = block_use(stream, longest_run(len(stream), count), progress.step)
            progress.finish()
            return {"removed": list(criterion.select(use, count)), "repairing": list(adders)}

        found = with_oom_retry(attempt, min(max(BATCH_TOKENS // length, 1), len(sample)), progress)
        state.block_choice = run.group.broadcast_object(found)
    return without_blocks(run, state.block_choice["removed"], state.block_choice["repairing"], progress)


def without_blocks(run: RunContext, removed: Sequence[int], adders: Sequence[str], progress: Progress) -> RunContext:
    """The run without some blocks.

    Args:
        run: the job.
        removed: numbers of the blocks, rising.
        adders: full names of the layers that add to the residual stream.
        progress: told which blocks are removed.
    """
    skeleton, planned = run.skeleton, run.structure
    assert planned.whole is not None
    kept = [index for index in range(len(skeleton.blocks)) if index not in removed]
    structure = keep_blocks(skeleton, planned.whole, kept, run.job.trust_remote_code)
    check_written(structure, read_json(run.source.folder / "config.json"))
    first, *others = planned.summary
    which = f"{_ranges(removed)} of 0 to {len(skeleton.blocks) - 1}"
    progress.note(f"removed blocks: {which}")
    summary = (f"{first}: {which} removed", *others)
    structure = replace(structure, summary=summary, ratios=planned.ratios, whole=planned.whole)
    plan = run.plan.within(skeleton, kept)
    fitted = plan.names & frozenset(adders if run.recipe.compensate else ())
    if run.pattern is None and run.grid is None:
        why = NOTHING_TO_FIT if run.recipe.compensate else NOTHING_TO_LOSE
        plan = plan.smaller(fitted | structure.sliced_layers(skeleton), 0, why)
    return replace(run, structure=structure, plan=plan, repairing=fitted)


def _ranges(numbers: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` -> `3-5, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
