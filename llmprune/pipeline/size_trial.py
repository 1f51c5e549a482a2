"""Removes parts of a model on a few tokens, without writing anything, and measures what the model has become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.job import Job
from llmprune.pipeline.block_choice import without_blocks
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.resolve import resolve
from llmprune.pipeline.size_options import Planner
from llmprune.pipeline.steps import observed
from llmprune.progress import Progress
from llmprune.pruning.sparsity import Removal, Sparsity
from llmprune.runtime.oom import with_oom_retry
from llmprune.streaming.batch_shards import whole_batches
from llmprune.streaming.block_use import TOKENS
from llmprune.streaming.stream import BATCH_TOKENS, BlockStream, Resources
from llmprune.streaming.stream_divergence import stream_divergence

HELD_OUT_EVERY = 4
"""One window in so many is not fitted to, but measured on."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Measures removals from one model, by the criteria and fits of one job; every process on its own.

    Args:
        run: of the same model, which loses nothing.
        job: what the user asked for.
        plan: plans removals.
        adders: full names of the layers that add to the residual stream.
    """

    run: RunContext
    job: Job
    plan: Planner
    adders: tuple[str, ...]

    def __call__(self, removals: Sequence[Removal], blocks: Sequence[int], progress: Progress) -> float:
        """The divergence from the dense model's next-token distribution, in nats per token, on held-out windows.

        All blocks are passed once, parts are removed and the others fitted, as in the run that is to come; neither
        a pattern nor a grid follows, and nothing is reconstructed.

        Args:
            removals: what is removed.
            blocks: numbers of the removed blocks, rising.
            progress: told about every block.
        """
        run, windows = self._without(removals, blocks), sample_of(self.run)
        length = windows.shape[1]
        most = max(len(windows) // HELD_OUT_EVERY, 1)
        return with_oom_retry(
            lambda at_once: _measured(run, windows, at_once, progress),
            min(max(BATCH_TOKENS // length, 1), most),
            progress,
        )

    def _without(self, removals: Sequence[Removal], blocks: Sequence[int]) -> RunContext:
        """The run in which these are removed, and nothing else is done."""
        asked = self.job.goal.chosen(removals)
        procedure = resolve(with_sparsity(self.job, asked))
        recipe = replace(procedure.recipe, reconstruct=0, permute=False, allocate="uniform")
        procedure = replace(procedure, sparsity=Sparsity(asked.removals, None), recipe=recipe, grid=None)
        run = replace(self.run, job=self.job, procedure=procedure, structure=self.plan(asked.removals))
        return without_blocks(run, blocks, self.adders, Progress()) if blocks else run


def with_sparsity(job: Job, sparsity: Sparsity) -> Job:
    """A job with other removals, without the flags that are for channels where none go."""
    channels = any(removal.kind == "channels" for removal in sparsity.removals)
    return replace(job, sparsity=sparsity.name, round_to=job.round_to if channels else None)


def sample_of(run: RunContext) -> Tensor:
    """The few calibration windows on which a size is chosen, `(windows, length)`."""
    windows = run.data.calibration.tokens
    return windows[: max(TOKENS // windows.shape[1], 2)]


def _measured(run: RunContext, windows: Tensor, at_once: int, progress: Progress) -> float:
    numbers = [shard.batch for shard in whole_batches(len(windows), at_once)]
    held_out = frozenset(numbers[-max(len(numbers) // HELD_OUT_EVERY, 1) :])
    observe = replace(observed(run), dense_stream=True, left_out=held_out)
    stream = BlockStream(run.skeleton, windows, observe, Resources(at_once * windows.shape[1]))
    progress.start("trying sizes", stream.left)
    for block in stream:
        for group in stream.groups(block):
            solution = run.solver.solve(group.problem, None)
            group.write(solution.layers, solution.order)
        progress.step()
    progress.finish()
    return stream_divergence(stream, held_out)
