"""What a pruned folder is worth and what pruning must cost at least: plain torch and transformers, no code of ours."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

REPEATS = 7


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of one folder with its standard error, and how many of its layers hold the pattern."""

    perplexity: float
    standard_error: float
    window_losses: list[float]
    layers: int
    layers_in_pattern: int
    sparsity: float


def load_model(folder: Path) -> Any:
    """The folder's model in float32, by stock transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def first_windows(text: str, model: Path, count: int, context: int) -> Tensor:
    """The first windows of a text, tokenised once as a whole without special tokens: `(windows, context)`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(count, len(ids) // context)
    return torch.tensor(ids[: count * context]).reshape(count, context)


def quality(model: Any, windows: Tensor, wanted: str) -> Quality:
    """Perplexity, exp of the mean loss; its standard error by the delta method; the pattern of every layer.

    Args:
        model: as `load_model` gives it.
        windows: `(windows, context)`, each read alone.
        wanted: `"N:M"` (N of every M weights pruned) or a share such as `"0.5"`.
    """
    losses = window_losses(model, windows)
    perplexity = math.exp(statistics.fmean(losses))
    error = perplexity * statistics.stdev(losses) / math.sqrt(len(losses))
    masks = [layer.weight.detach() == 0 for layer in decoder_linears(model)]
    held = sum(holds(zeros, wanted) for zeros in masks)
    sparsity = sum(int(zeros.sum()) for zeros in masks) / sum(zeros.numel() for zeros in masks)
    return Quality(perplexity, error, losses, len(masks), held, sparsity)


def window_losses(model: Any, windows: Tensor) -> list[float]:
    """Mean next-token cross-entropy of each window."""
    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(nn.functional.cross_entropy(logits, window[1:])))
    return losses


def holds(zeros: Tensor, wanted: str) -> bool:
    """Whether at least the wanted weights `(out, in)` are zero: in every group, or in the layer up to 0.1 point."""
    if ":" not in wanted:
        return float(zeros.float().mean()) >= float(wanted) - 1e-3
    pruned, group = map(int, wanted.split(":"))
    return zeros.shape[1] % group == 0 and bool((zeros.reshape(len(zeros), -1, group).sum(-1) >= pruned).all())


def decoder_linears(model: Any) -> list[nn.Linear]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def floor(model: Any, samples: int, length: int) -> dict[str, Any]:
    """Seconds that this machine's matrix products need for what no implementation avoids.

    That is one dense forward through the blocks (attention causal, so half) and one symmetric Gram for every tensor
    that feeds layers, over `samples` windows of `length` tokens.
    """
    layers = decoder_linears(model)
    config, tokens = model.config, samples * length
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    flops = {
        "linear": 2.0 * tokens * sum(layer.in_features * layer.out_features for layer in layers),
        "attention": 2.0 * tokens * (length + 1) * config.num_hidden_layers * heads * head_size,
        "gram": float(tokens * sum(width * (width + 1) for width in input_widths(model, layers))),
    }
    rate = matmul_rate({(layer.in_features, layer.out_features) for layer in layers}, min(4096, tokens))
    return {"flops": flops, "flops_per_second": rate, "seconds": sum(flops.values()) / rate}


def input_widths(model: Any, layers: list[nn.Linear]) -> list[int]:
    """The width of every distinct tensor that feeds the layers."""
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 8), dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    return list({id(tensor): tensor.shape[-1] for tensor in inputs}.values())


def matmul_rate(shapes: set[tuple[int, int]], rows: int) -> float:
    """This machine's float32 FLOP a second: the median over the model's own layer shapes, `rows` tokens at a time."""
    rates = []
    for inputs, outputs in sorted(shapes):
        left, right = torch.randn(rows, inputs), torch.randn(inputs, outputs)
        rates.append(2.0 * rows * inputs * outputs / product_seconds(left, right))
    return statistics.median(rates)


def product_seconds(left: Tensor, right: Tensor) -> float:
    """Median seconds of a matrix product, after one warm-up."""
    taken = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
