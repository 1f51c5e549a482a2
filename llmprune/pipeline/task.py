"""The quantities that the cost of a run depends on, counted from its layers and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.model.blocks import LayerRef
from llmprune.model.experts import active_experts
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.criteria import load_criterion
from llmprune.pruning.grid import Grid
from llmprune.pruning.methods import Cost, load_method
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.statistics import HELD_OUT
from llmprune.streaming.block_use import TOKENS


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


def adding(plan: Plan, width: int) -> list[LayerRef]:
    """The layers that likely add to the residual stream: the last one of its module, as wide as the stream."""
    last = {layer.name.rpartition(".")[0]: layer for layer in plan.layers if layer.expert is None}
    return [layer for layer in last.values() if layer.shape[0] == width]


def chosen_on(task: Task) -> int:
    """The tokens on which the blocks to be removed are chosen."""
    return min(task.tokens, max(TOKENS // task.seq_len, 2) * task.seq_len)


def fits(tokens: int) -> int:
    """The values of a smoother: from every fitted token to every held-out one."""
    held = int(HELD_OUT * tokens)
    return held * (tokens - held)


def fitted_inputs(task: Task) -> int:
    """The most inputs of a layer that likely adds to the residual stream."""
    return max((layer.shape[1] for layer in adding(task.plan, task.hidden)), default=task.hidden)


def costs(recipe: Recipe) -> list[Cost]:
    """The costs of the criterion for channels and heads, and of the method for weights, as far as there are such."""
    found = [load_criterion(recipe.criterion).cost] if recipe.criterion else []
    return found + ([load_method(recipe.method).cost] if recipe.method else [])


def lands(task: Task, layer: LayerRef) -> bool:
    """Whether its output is likely added to the residual stream; known only when its block has run."""
    return rows(task, layer) == layer.shape[0] == task.hidden


def rows(task: Task, layer: LayerRef) -> int:
    """Outputs of all layers that are likely fed by the same inputs as this one."""
    group = (layer.name.rpartition(".")[0], layer.shape[1])
    return sum(other.shape[0] for other in task.plan.layers if (other.name.rpartition(".")[0], other.shape[1]) == group)
