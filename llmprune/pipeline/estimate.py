"""Estimates of a run: time from counted operations, peak memory from counted bytes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmprune.job import Job
from llmprune.model.blocks import LayerRef
from llmprune.model.experts import active_experts
from llmprune.model.reader import PIECE, Entry
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.model.writer import HELD_BYTES
from llmprune.pipeline.block_choice import NOTHING_TO_FIT
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.prepare import prepare, without_generation_if_too_large
from llmprune.pipeline.report_builder import coverage, initial_report
from llmprune.pipeline.resolve import applicable
from llmprune.progress import Progress
from llmprune.pruning.criteria import load_criterion
from llmprune.pruning.grid import Grid
from llmprune.pruning.methods import Cost, load_method
from llmprune.pruning.recipe import EFFORTS, Recipe
from llmprune.pruning.sparsity import parse_sparsity
from llmprune.pruning.statistics import HELD_OUT
from llmprune.sources.generated import generation_batch_size, model_bytes, window_bytes
from llmprune.streaming.block_use import LONGEST, TOKENS
from llmprune.streaming.check_stream import WINDOW
from llmprune.streaming.expert_statistics import POOLED_TOKENS
from llmprune.streaming.perplexity import CHUNK_ELEMENTS
from llmprune.streaming.stream import BATCH_TOKENS, BLOCK_MEMORY

WRITING = 3  # a token alone takes so many times what it takes among others
REPORTED = ("model", "sparsity", "quantization", "method", "recipe", "coverage", "calibration", "out")
"""What a plan says as a report does."""
LATE = 24 * 2**20  # of the libraries, what is paged in only when it is used


@dataclass(frozen=True, slots=True)
class Task:
    """The quantities that the cost of a run depends on.

    Args:
        skeleton: the model.
        plan: the layers.
        recipe: what is done to them.
        text: tokens of the calibration text.
        seq_len: tokens per window.
        evaluation: evaluation tokens, each used twice; 0 for none.
        budget: bytes of hidden states that may rest in memory.
        grid: of the weights that are kept; None for floating point.
        removed: number of blocks that are removed; the plan is of the others.
    """

    skeleton: Skeleton
    plan: Plan
    recipe: Recipe
    text: int
    seq_len: int
    evaluation: int
    budget: int
    grid: Grid | None = None
    removed: int = 0

    @property
    def own(self) -> int:
        """Tokens that the dense model writes."""
        return self.recipe.self_calibration_windows(self.text // self.seq_len) * self.seq_len

    @property
    def tokens(self) -> int:
        """All calibration tokens."""
        return self.text + self.own

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.skeleton.width

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.skeleton.config.get_text_config().vocab_size)

    @property
    def blocks(self) -> int:
        """Number of blocks that stay."""
        return max(len(self.skeleton.blocks) - self.removed, 1)

    @property
    def groups(self) -> dict[tuple[str, int], float]:
        """Layers that are likely fed by the same inputs: the module that holds them, their width; and their share."""
        return {(layer.name.rpartition(".")[0], layer.shape[1]): self.share(layer) for layer in self.plan.layers}

    def share(self, layer: LayerRef) -> float:
        """Fraction of the tokens that reach a layer: less than 1 for experts, if they get equally many."""
        experts = layer.expert.layout.count if layer.expert else 1
        return min(active_experts(self.skeleton.config) / experts, 1.0)

    @property
    def active(self) -> float:
        """Number of block parameters that a token meets."""
        return self.plan.block_parameters - sum((1 - self.share(layer)) * layer.weights for layer in self.plan.layers)

    @property
    def element(self) -> int:
        """Bytes of a number in a forward."""
        return self.skeleton.compute.itemsize


def dry_run(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """The plan of a run: layers, sizes, and an estimate of its time and memory; nothing is written.

    Raises:
        InputError: the job cannot be done.
    """
    run = prepare(job, progress or Progress(), headers_only=True)
    report = initial_report(run).to_json()
    text, evaluation = run.data.calibration.tokens, run.data.evaluation
    evaluated = evaluation.tokens.numel() if evaluation else 0
    rate, budget = product_rate(), run.job.activation_memory
    plan, removed = _left(run), len(run.removed_blocks)
    task = Task(run.skeleton, plan, run.recipe, text.numel(), text.shape[1], evaluated, budget, run.grid, removed)
    return {
        **{key: report[key] for key in REPORTED},
        "coverage": coverage(plan),
        "layers": [{"name": layer.name, "shape": layer.shape} for layer in plan.layers],
        "size": {"dense": run.skeleton.checkpoint.folder.nbytes, "pruned": run.plan.out_bytes},
        "estimate": {
            "seconds": seconds(task, rate),
            "memory": memory(task),
            "blocks_by_expert": blocks_by_expert(task),
        },
        "efforts": {name: seconds(at_effort(task, job.at(name)), rate) for name in EFFORTS},
    }


def _left(run: RunContext) -> Plan:
    """The plan without the blocks that are removed: which ones go is not known yet, so it is without the last ones."""
    kept = run.structure.kept_blocks
    if kept is None:
        return run.plan
    plan = run.plan.within(run.skeleton, kept)
    if run.pattern is not None or run.grid is not None:
        return plan
    fitted = frozenset(layer.name for layer in _adding(plan, run.skeleton.width) if run.recipe.compensate)
    return plan.smaller(fitted | run.structure.sliced_layers(run.skeleton), 0, NOTHING_TO_FIT)


def _adding(plan: Plan, width: int) -> list[LayerRef]:
    """The layers that likely add to the residual stream: the last one of its module, as wide as the stream."""
    last = {layer.name.rpartition(".")[0]: layer for layer in plan.layers if layer.expert is None}
    return [layer for layer in last.values() if layer.shape[0] == width]


def at_effort(task: Task, job: Job) -> Task:
    """The same task with the recipe of another effort, as it would be run here."""
    recipe = applicable(job.recipe, job, parse_sparsity(job.sparsity))
    recipe, _ = without_generation_if_too_large(recipe, job, task.skeleton, task.seq_len)
    return replace(task, recipe=recipe)


def seconds(task: Task, rate: float) -> float:
    """Wall time.

    Args:
        task: the run.
        rate: operations per second, from `product_rate`.
    """
    plan, recipe, tokens = task.plan, task.recipe, task.tokens
    forward = 2 * task.active + 4 * task.seq_len * task.hidden * task.blocks
    gram = sum(share * width**2 for (_, width), share in task.groups.items())
    product = sum(2 * rows * width**2 for rows, width in (layer.shape for layer in plan.layers))
    factor = sum(4 * width**3 / 3 for _, width in task.groups)
    evaluate = 2 * task.evaluation * (forward + 2 * task.hidden * task.vocabulary)
    # With a dense stream: two forwards, three Grams and a full cross Gram, or products with outputs; a gradient costs
    # about two forwards more.
    alone = [layer.shape for layer in plan.layers if _lands(task, layer)]
    cross = 4 * gram + sum(4 * width * (rows - width) for rows, width in alone)
    stream = tokens * ((2 * forward + gram + cross) if recipe.dense_stream else forward + gram)
    stream += _rerouting(task) * (2 if recipe.targets == "dense" else 1)
    train = recipe.reconstruct * tokens * 3 * forward
    write = WRITING * task.own * (forward + 2 * task.hidden * task.vocabulary)
    refits = recipe.steps - (0 if recipe.refit else 1)
    on_grid = 3 * recipe.grid_passes + 2 if task.grid else 0
    products = recipe.steps * sum(cost.products for cost in _costs(recipe)) + 10 * refits
    factors = 1
    if recipe.targets == "dense":
        products, factors = products + 8, 3
    if recipe.allocate != "uniform":
        stream += tokens * (forward + gram)
        products, factors = products + 2 * load_method(recipe.method).cost.products, factors + 2
    stream += _leaving_out(task)
    return (stream + train + write + (products + on_grid + 2) * product + factors * factor + evaluate) / rate


def _rerouting(task: Task) -> float:
    """Operations that send to every expert its own tokens again, and others as well, and take their Gram."""
    experts = [layer for layer in task.plan.layers if layer.expert]
    own = task.tokens * sum(2 * task.share(layer) * layer.weights for layer in experts)
    if not task.recipe.shrinkage:
        return own
    return own + min(task.tokens, POOLED_TOKENS) * sum(2 * layer.weights + layer.shape[1] ** 2 for layer in experts)


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
    tokens, longest = _chosen_on(task), min(LONGEST, task.removed)
    held, width = _held(task), _fitted_inputs(task)
    places = longest * (tokens * task.hidden + _fits(tokens)) + task.hidden * tokens
    fit = tokens * (2 * width + task.hidden) + 3 * width**2
    return held.whole * task.element + held.experts + 4 * (places + fit) + _resting(task, tokens, 1)


def _chosen_on(task: Task) -> int:
    """The tokens on which the blocks to be removed are chosen."""
    return min(task.tokens, max(TOKENS // task.seq_len, 2) * task.seq_len)


def _fits(tokens: int) -> int:
    """The values of a smoother: from every fitted token to every held-out one."""
    held = int(HELD_OUT * tokens)
    return held * (tokens - held)


def _fitted_inputs(task: Task) -> int:
    """The most inputs of a layer that likely adds to the residual stream."""
    return max((layer.shape[1] for layer in _adding(task.plan, task.hidden)), default=task.hidden)


def _leaving_out(task: Task) -> float:
    """Operations of choosing the blocks that are removed, and of passing the dense activations through these."""
    if not task.removed:
        return 0.0
    blocks, tokens = task.blocks + task.removed, _chosen_on(task)
    block = (2 * task.active + 4 * task.seq_len * task.hidden * task.blocks) / task.blocks
    width, longest = _fitted_inputs(task), min(LONGEST, task.removed)
    fit = 2 * tokens * width**2 + 4 * width**3 / 3 + 2 * _fits(tokens) * (width + longest * task.hidden)
    # A block in front of removed ones is passed twice.
    ahead = 2 * task.removed * task.tokens * block if task.recipe.dense_stream else 0
    # The dense model also generates text, and is evaluated.
    dense = (WRITING * task.own + task.evaluation) * task.removed * block
    return blocks * (tokens * block + fit) + ahead + dense


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
        (_solving(task, layer.shape[1], _rows(task, layer), _lands(task, layer)) for layer in task.plan.layers),
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
    stages = [(cost.squares, cost.stacks + (1 if paired else 0)) for cost in _costs(recipe)]
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


def _lands(task: Task, layer: LayerRef) -> bool:
    """Whether its output is likely added to the residual stream; known only when its block has run."""
    return _rows(task, layer) == layer.shape[0] == task.hidden


def _costs(recipe: Recipe) -> list[Cost]:
    """The costs of the criterion for channels and heads, and of the method for weights, as far as there are such."""
    found = [load_criterion(recipe.criterion).cost] if recipe.criterion else []
    return found + ([load_method(recipe.method).cost] if recipe.method else [])


def _rows(task: Task, layer: LayerRef) -> int:
    """Outputs of all layers that are likely fed by the same inputs as this one."""
    group = (layer.name.rpartition(".")[0], layer.shape[1])
    return sum(other.shape[0] for other in task.plan.layers if (other.name.rpartition(".")[0], other.shape[1]) == group)


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


def product_rate(size: int = 768, seconds: float = 0.4) -> float:
    """Floating-point operations per second of this machine's float32 matrix products, with all else that it does now.

    Args:
        size: of the matrices.
        seconds: how long to measure.
    """
    a = torch.ones(size, size)
    a @ a  # warm-up
    done, spent, start = 0, 0.0, time.perf_counter()
    while spent < seconds:
        a @ a
        done, spent = done + 1, time.perf_counter() - start
    return 2 * size**3 * done / spent
