"""One SparseGPT or GPTQ run of LLM Compressor, timed from the inside; see `peer_worker.py`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # an isolated Python does not look beside the script
from peer_worker import Stages, load_dense, run, save_dense, watch

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets", "safetensors", "numpy")
SOLVERS = {
    "prune": ("llmcompressor.modifiers.pruning.sparsegpt.base", "sparsify_weight"),
    "quantize": ("llmcompressor.modifiers.gptq.base", "quantize_weight"),
}


def modifier(sparsity: str) -> Any:
    """SparseGPT on every linear layer but the head; `sparsity` is "N:M" (prunes N of M) or a fraction such as "0.5"."""
    if ":" in sparsity:
        pruned, group = (int(number) for number in sparsity.split(":"))
        options: dict[str, Any] = {"sparsity": pruned / group, "mask_structure": sparsity}
    else:
        options = {"sparsity": float(sparsity), "mask_structure": "0:0"}
    pruning = importlib.import_module("llmcompressor.modifiers.pruning")
    return pruning.SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **options)


def quantizer(group: int, plain: bool) -> Any:
    """Symmetric int4 of every linear layer but the head, a scale for so many inputs of a row (0: for a row).

    Args:
        group: number of these inputs.
        plain: whether weights are rounded to the nearest value, without GPTQ.
    """
    quantization = importlib.import_module("compressed_tensors.quantization")
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = quantization.QuantizationArgs(num_bits=4, symmetric=True, **strategy)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    room, name = ("quantization", "QuantizationModifier") if plain else ("gptq", "GPTQModifier")
    kind = getattr(importlib.import_module(f"llmcompressor.modifiers.{room}"), name)
    return kind(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"])


def round_weights(model: Any) -> None:
    """Put weights on their grids: a folder of dense tensors has them as they are, and only forwards round them."""
    lifecycle = importlib.import_module("compressed_tensors.quantization.lifecycle")
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            values = lifecycle.fake_quantize(module.weight.data, module.weight_scale, zero, scheme.weights)
            module.weight.data.copy_(values)


def calibration(path: Path) -> tuple[Any, int, int]:
    """The frozen windows as an already tokenised dataset with full attention, and its (samples, length)."""
    tokens = importlib.import_module("safetensors.torch").load_file(path)["tokens"]
    samples, length = tokens.shape
    columns = {"input_ids": tokens.tolist(), "attention_mask": [[1] * length] * samples}
    return importlib.import_module("datasets").Dataset.from_dict(columns), samples, length


def prune(options: argparse.Namespace) -> dict[str, Any]:
    """Load, prune, save; the seconds of each kept apart."""
    stages = Stages()
    with stages("import"):
        oneshot = importlib.import_module("llmcompressor").oneshot
        module, solver = SOLVERS["prune" if options.int4_group is None else "quantize"]
        solves, grams = watch(module, solver), watch(module, "accumulate_hessian")
    with stages("load"):
        model, tokenizer = load_dense(options.model, options.threads)
    with stages("oneshot"):
        dataset, samples, length = calibration(options.tokens)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=modifier(options.sparsity)
            if options.int4_group is None
            else quantizer(options.int4_group, options.round),
            dataset=dataset,
            num_calibration_samples=samples,
            max_seq_length=length,
            batch_size=options.batch_size,
            shuffle_calibration_samples=False,
            pad_to_max_length=False,
        )
        round_weights(model)
    with stages("save"):
        save_dense(model, tokenizer, options.out, save_compressed=False)
    seconds = {**stages.seconds, "solve": solves.seconds, "gram": grams.seconds}
    return {"seconds": seconds, "solves": solves.calls, "tokens_shape": [samples, length]}


if __name__ == "__main__":
    run("One SparseGPT run of LLM Compressor, timed from the inside.", PACKAGES, prune)
