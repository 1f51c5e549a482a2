"""The peak memory of a run, from counted bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmprune.model.reader import PIECE, Entry
from llmprune.model.writer import HELD_BYTES
from llmprune.pipeline.task import Task, chosen_on, costs, fits, fitted_inputs, lands, rows
from llmprune.pruning.recipe import Recipe
from llmprune.sources.generated import generation_batch_size, model_bytes, window_bytes
from llmprune.streaming.block_use import longest_run
from llmprune.streaming.check_stream import WINDOW
from llmprune.streaming.perplexity import CHUNK_ELEMENTS
from llmprune.streaming.stream import BATCH_TOKENS, BLOCK_MEMORY

LATE = 24 * 2**20  # of the libraries, what is paged in only when it is used


def memory(task: Task) -> int:
    """Peak memory in bytes above that of the libraries: the maximum over the stages of a run."""
    stages = [_reading(task), _checking(task), _pruning(task)]
    if task.own:
        stages.append(_writing(task))
    if task.evaluation:
        stages.append(_evaluating(task))
    if task.removed:
        stages.append(_choosing(task))
    if task.recipe.allocate != "uniform":
        stages.append(_pruning(replace(task, recipe=Recipe(task.recipe.method))))
    return LATE + max(stages)


def blocks_by_expert(task: Task) -> int:
    """The number of blocks of which only some experts are in memory at a time."""
    return 0 if task.recipe.whole_blocks else sum(bool(sliced) for sliced in _sliced(task))


def _sliced(task: Task) -> list[set[str]]:
    """The parameters of every block that are read slice by slice."""
    return [set(task.skeleton.sliced(task.skeleton.block_parameters(index))) for index in range(task.blocks)]


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of a block while it is in memory.

    Args:
        whole: number of those that are there as a whole.
        covered: number of those among them that are pruned.
        experts: bytes of experts beside them, at most.
    """

    whole: int
    covered: int
    experts: int


def _held(task: Task, all_of_it: bool = False) -> Held:
    """Of the mean block."""
    covered = task.plan.covered // task.blocks
    apart: set[str] = set() if all_of_it else set().union(*_sliced(task))
    if not apart:
        return Held(_block(task), covered, 0)
    weights = sum(layer.weights for layer in task.plan.layers if layer.parameter in apart) // task.blocks
    largest = max(layer.weights for layer in task.plan.layers if layer.parameter in apart)
    limit = max(task.skeleton.expert_memory, largest * task.element) + largest * task.element
    return Held(_block(task) - weights, covered - weights, min(limit, 2 * weights * task.element))


def _reading(task: Task) -> int:
    """Bytes up to the first block: any tensor as it is checked, the embeddings, the shard outside of the blocks."""
    largest = max(min(entry.nbytes, PIECE) for entry in task.skeleton.checkpoint.folder.entries.values())
    outside = [entry.nbytes for entry in _entries_of(task, task.skeleton.outside())]
    written = min(HELD_BYTES, sum(outside)) + max(outside, default=0)
    loaded = _loaded(task, task.skeleton.before_blocks())
    return max(2 * largest, max(loaded, written) + _resting(task, task.tokens, _streams(task)))


def _checking(task: Task) -> int:
    """All that lies outside of the blocks, a block, and logits of the windows that run through the whole model."""
    windows = 2 if task.evaluation and task.skeleton.beside else 1
    logits = 3 * 4 * windows * min(WINDOW, task.seq_len) * task.vocabulary
    held, outside = _held(task), task.skeleton.outside()
    block = held.whole * task.element + held.experts
    return max(_loaded(task, outside), _kept(task, outside) + max(block, logits))


def _writing(task: Task) -> int:
    """Bytes of the whole model and of all windows that are generated together."""
    at_once = min(generation_batch_size(task.skeleton, task.seq_len), task.own // task.seq_len)
    return model_bytes(task.skeleton) + at_once * window_bytes(task.skeleton, task.seq_len)


def _choosing(task: Task) -> int:
    """A block and the dense activations of a few windows, and what the fits of runs of blocks need, see `block_use`."""
    tokens, longest = chosen_on(task), longest_run(task.blocks + task.removed, task.removed)
    held, width = _held(task), fitted_inputs(task)
    places = longest * (tokens * task.hidden + fits(tokens)) + task.hidden * tokens
    fit = tokens * (2 * width + task.hidden) + 3 * width**2
    return held.whole * task.element + held.experts + 4 * (places + fit) + _resting(task, tokens, 1)


def _evaluating(task: Task) -> int:
    """Embeddings and head, logits and their softmax, hidden states; or a block."""
    logits = 3 * 4 * min(CHUNK_ELEMENTS, task.evaluation * task.vocabulary)
    head = _loaded(task, task.skeleton.outside()) + logits
    held = _held(task)
    block = held.whole * task.element + held.experts + _window(task)
    return max(head, block) + _resting(task, task.evaluation, 1)


def _pruning(task: Task) -> int:
    """A block, its dense and its stored weights, and the most of: solving a group, taking statistics, training."""
    recipe, checkpoint, parts = task.recipe, task.skeleton.checkpoint, _held(task, task.recipe.whole_blocks)
    covered = parts.covered
    held = parts.whole * task.element + parts.experts + covered * (task.element if recipe.dense_stream else 0)
    layers = task.plan.layers
    new = covered * checkpoint.stored_dtype(layers[0].parameter).itemsize if layers else 0
    solve = max(
        (_solving(task, layer.shape[1], rows(task, layer), lands(task, layer)) for layer in task.plan.layers),
        default=0,
    )
    pausing, repeating = _pausing(task), _resting(task, task.tokens, _streams(task))
    passing = pausing if pausing <= BLOCK_MEMORY else repeating
    window = _window(task)
    train = 4 * 6 * covered + window if recipe.reconstruct else 0
    # Weights that are stored in another form are there in both while they are written.
    written = sum(0 if checkpoint.stored_as_is(layer.parameter) else layer.weights for layer in task.plan.layers)
    rewrite = min(written // task.blocks, covered) * new // max(covered, 1)
    # The scale of every weight, and its code.
    rewrite += 2 * new if task.grid else 0
    if parts.experts:
        rewrite += min(HELD_BYTES, task.skeleton.checkpoint.out_bytes() // task.blocks)
    # The dense activations pass removed blocks while the one before is there.
    ahead = _block(task) * task.element + window + repeating if task.removed else 0
    return held + new + max(solve + passing, window + passing, train + repeating, rewrite, ahead)


def _solving(task: Task, width: int, rows: int, lands: bool) -> int:
    """A group of so many inputs and stacked rows: statistics, weights, and what the stages around the method need."""
    recipe, square, stack = task.recipe, width**2, rows * width
    paired = recipe.targets == "dense"
    stages = [(cost.squares, cost.stacks + (1 if paired else 0)) for cost in costs(recipe)]
    if paired:
        stages.append((3.5, 3.2 if lands else 5.5))
    if recipe.refit:
        stages.append((4.8, 3.5))
    if task.grid is not None:
        stages.append((4, 5))
    if recipe.permute or recipe.ridge:
        stages[0] = (stages[0][0] + (2.4 if recipe.permute else 1), stages[0][1])
    # The error is measured while the solutions are there, in float32 and as they are stored.
    stages.append((0, 6.3) if paired and not lands else (3, 3.3))
    most = max(squares * square + stacks * stack for squares, stacks in stages)
    statistics = square
    if paired:
        statistics = 2 * square + 3 * stack if lands else 5 * square
    elif recipe.criterion:
        # Where inputs are removed, those of held-out tokens stand apart.
        statistics = 2 * square
    return int(4 * (statistics + stack + most))


def _pausing(task: Task) -> int:
    """Bytes of the paused forwards of all batches: block inputs, intermediate activations, the groups' inputs."""
    # Experts run one after the other; what enters them stays.
    widths = sum(width for (_, width), share in task.groups.items() if share == 1) / task.blocks
    routed = max((share * width for (_, width), share in task.groups.items() if share < 1), default=0)
    widths += routed + (task.hidden if routed else 0)
    return int(_streams(task) * task.tokens * task.element * 2 * widths)


def _resting(task: Task, tokens: int, streams: int) -> int:
    """Hidden states that enter a block and leave it; none of them where they exceed the budget."""
    size = 2 * streams * tokens * task.hidden * task.element
    return size if size <= task.budget else 0


def _window(task: Task) -> int:
    """Bytes of the intermediate activations of one batch."""
    return 3 * _widest(task) + 4 * min(BATCH_TOKENS, task.tokens) * task.element * task.hidden


def _widest(task: Task) -> int:
    """The largest activation of one batch."""
    widest = max((max(layer.shape) for layer in task.plan.layers), default=task.hidden)
    return min(BATCH_TOKENS, task.tokens) * task.element * widest


def _streams(task: Task) -> int:
    return 2 if task.recipe.dense_stream else 1


def _block(task: Task) -> int:
    return task.plan.block_parameters // task.blocks


def _loaded(task: Task, names: list[str]) -> int:
    """Parameters in memory, while the largest is in its file's pages and copied, and then copied and converted."""
    pairs = [(entry.nbytes, task.element * math.prod(entry.shape)) for entry in _entries_of(task, names)]
    most = max((max(2 * stored, stored + made if stored != made else 0) - made for stored, made in pairs), default=0)
    return _kept(task, names) + most


def _kept(task: Task, names: list[str]) -> int:
    """Parameters in memory when they are loaded."""
    return sum(task.element * math.prod(entry.shape) for entry in _entries_of(task, names))


def _entries_of(task: Task, names: list[str]) -> list[Entry]:
    """The file entries of parameters."""
    checkpoint = task.skeleton.checkpoint
    return [checkpoint.folder.entries[name] for name in checkpoint.disk_names(names)]
