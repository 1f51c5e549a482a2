"""The time of a run, from counted operations."""

from __future__ import annotations

import time

import torch

from llmprune.pipeline.task import Task, chosen_on, costs, fits, fitted_inputs, lands
from llmprune.pruning.methods import load_method
from llmprune.streaming.block_use import longest_run
from llmprune.streaming.expert_statistics import POOLED_TOKENS

WRITING = 3  # a token alone takes so many times what it takes among others


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
    alone = [layer.shape for layer in plan.layers if lands(task, layer)]
    cross = 4 * gram + sum(4 * width * (rows - width) for rows, width in alone)
    stream = tokens * ((2 * forward + gram + cross) if recipe.dense_stream else forward + gram)
    stream += _rerouting(task) * (2 if recipe.targets == "dense" else 1)
    train = recipe.reconstruct * tokens * 3 * forward
    write = WRITING * task.own * (forward + 2 * task.hidden * task.vocabulary)
    refits = recipe.steps - (0 if recipe.refit else 1)
    on_grid = 3 * recipe.grid_passes + 2 if task.grid else 0
    products = recipe.steps * sum(cost.products for cost in costs(recipe)) + 10 * refits
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


def _leaving_out(task: Task) -> float:
    """Operations of choosing the blocks that are removed, and of passing the dense activations through these."""
    if not task.removed:
        return 0.0
    blocks, tokens = task.blocks + task.removed, chosen_on(task)
    block = (2 * task.active + 4 * task.seq_len * task.hidden * task.blocks) / task.blocks
    width, longest = fitted_inputs(task), longest_run(task.blocks + task.removed, task.removed)
    fit = 2 * tokens * width**2 + 4 * width**3 / 3 + 2 * fits(tokens) * (width + longest * task.hidden)
    # A block in front of removed ones is passed twice.
    ahead = 2 * task.removed * task.tokens * block if task.recipe.dense_stream else 0
    # The dense model also generates text, and is evaluated.
    dense = (WRITING * task.own + task.evaluation) * task.removed * block
    return blocks * (tokens * block + fit) + ahead + dense


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
