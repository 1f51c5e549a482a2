"""Compares the stream with the whole model on one short window, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.batch import Batch, hidden_of
from llmprune.streaming.capture import BlockInputs, capture_block_inputs, forwards_replaced, logits, run_model

WINDOW = 128
"""Tokens of the window, at most."""
TOLERANCE = 1e-4
"""Relative difference that is taken for rounding; in half precision `4 · eps`, if that is more."""
CHAIN = "only models whose blocks run once each, one after the other, can be streamed"


@torch.no_grad()
def check_stream(
    skeleton: Skeleton, tokens: Tensor, scores: bool = True, step: Callable[[], None] = lambda: None
) -> None:
    """Run one short window to the end of the whole model, and through the stream; both must compute the same.

    The whole model runs as it does elsewhere, but the weights of a block are in memory only while it is called. There
    the block is called a second time, as the stream calls it, with what the stream has made of the window so far.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        scores: whether perplexity is to be measured: logits are compared too, and the tokens of a wrapper must not
            see later ones.
        step: called after every block.

    Raises:
        InputError: blocks are called twice, or not at all; or the relative difference `‖a − b‖ / ‖b‖` of the output of
            a block, or of the logits, is more than rounding. With `scores`, in a wrapper, the same of the hidden
            states of all positions but the last, when another token stands there.
    """
    window = tokens[:1, :WINDOW]
    causal = scores and bool(skeleton.beside)
    if causal:
        window = torch.cat([window, _with_another_end(window, skeleton.config.get_text_config().vocab_size)])
    inputs = capture_block_inputs(skeleton, window, len(window))
    with skeleton.loaded(skeleton.outside()):
        walk = _Walk(skeleton, inputs.batches[0], step)
        with forwards_replaced(skeleton.blocks, walk.forward_of):
            output = run_model(skeleton, window)
        if walk.called < len(skeleton.blocks):
            raise InputError(f"{walk.model} calls {walk.called} of its {len(skeleton.blocks)} blocks", CHAIN)
        if scores:
            stored = inputs.wrap.axes.stored(walk.hidden)
            if causal:
                _check_causal(skeleton, stored)
            _check_scores(skeleton, window, stored, inputs, output.logits)


class _Walk:
    """Lets every block run twice: as the whole model calls it, and as the stream does.

    Args:
        skeleton: the model, its weights outside of the blocks loaded.
        batch: the window as it enters the first block of the stream.
        step: called after every block.

    Attributes:
        hidden: what has left the last block of the stream.
        called: number of blocks so far.
    """

    def __init__(self, skeleton: Skeleton, batch: Batch, step: Callable[[], None]) -> None:
        self.skeleton, self.batch, self.step = skeleton, batch, step
        self.model = type(skeleton.model).__name__
        self.hidden = batch.entered().to(skeleton.device)
        self.called = 0
        self._forwards = [block.forward for block in skeleton.blocks]

    def forward_of(self, index: int) -> Callable[..., Any]:
        """The forward of a block in the whole model."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = self.skeleton.block_name(index)
            if index != self.called:
                again = index < self.called
                raise InputError(f"{self.model} calls {name!r} {'once more' if again else 'too early'}", CHAIN)
            with self.skeleton.loaded(self.skeleton.block_parameters(index)):
                output = self._forwards[index](*args, **kwargs)
                found = self.batch.calls[index].run(self._forwards[index], self.hidden)
            self.called, self.hidden = index + 1, hidden_of(found)
            self._compare(f"the output of {name!r}", self.hidden, hidden_of(output))
            self.step()
            return output

        return forward

    def _compare(self, what: str, found: Tensor, wanted: Tensor) -> None:
        if (difference := relative_difference(found, wanted)) > _tolerance(self.skeleton):
            raise InputError(
                f"{what} differs by {difference:.1%} between {self.model} as a whole and block by block",
                "this model passes on something that cannot be seen from outside its blocks; it cannot be streamed",
            )


def _with_another_end(window: Tensor, vocabulary: int) -> Tensor:
    """The window with another last token."""
    return torch.cat([window[:, :-1], (window[:, -1:] + 1) % vocabulary], 1)


def _check_causal(skeleton: Skeleton, hidden: Tensor) -> None:
    """Compare what has left the last block in two windows, `(2, length, ...)`, that differ in their last token."""
    if (difference := relative_difference(hidden[1, :-1], hidden[0, :-1])) > _tolerance(skeleton):
        raise InputError(
            f"in {type(skeleton.model).__name__} tokens see those that come after them: the last one changes the "
            f"others by {difference:.1%}",
            "perplexity does not measure such a model; leave it out with --no-eval",
        )


def _check_scores(skeleton: Skeleton, window: Tensor, stored: Tensor, inputs: BlockInputs, wanted: Tensor) -> None:
    """Compare the logits of a part of the positions at a time, as perplexity is measured."""
    half = max(window.shape[1] // 2, 1)
    pairs = zip(torch.split(window, half, 1), torch.split(stored, half, 1), strict=True)
    found = torch.cat([logits(skeleton, tokens, part, inputs.wrap) for tokens, part in pairs], 1)
    if (difference := relative_difference(found, wanted)) > _tolerance(skeleton):
        raise InputError(
            f"the logits of {type(skeleton.model).__name__} differ by {difference:.1%} when a part of the positions is "
            "computed at a time",
            "perplexity cannot be measured; leave it out with --no-eval",
        )


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """`‖a − b‖ / ‖b‖`; 0 where b is not finite, which is said elsewhere, infinite for another shape."""
    if found.shape != wanted.shape:
        return torch.inf
    if not bool(torch.isfinite(wanted).all()):
        return 0.0
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _tolerance(skeleton: Skeleton) -> float:
    return max(TOLERANCE, 4 * torch.finfo(skeleton.compute).eps)
