"""One SparseGPT run of NVIDIA Model Optimizer, timed from the inside; see `peer_worker.py`.

It finds all masks from the dense model's statistics at once, and leaves the weights that stay as they were.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # an isolated Python does not look beside the script
from peer_worker import Stages, load_dense, run, save_dense, watch

PACKAGES = ("nvidia-modelopt", "torch", "transformers", "safetensors", "numpy")
SPARSITY = "modelopt.torch.sparsity.weight_sparsity"


def prune(options: argparse.Namespace) -> dict[str, Any]:
    """Load, prune, save; the seconds of each kept apart."""
    stages = Stages()
    with stages("import"):
        sparsity, torch = importlib.import_module(SPARSITY), importlib.import_module("torch")
        solves = watch(f"{SPARSITY}.sparsegpt", "create_sgpt_mask")
    with stages("load"):
        model, tokenizer = load_dense(options.model, options.threads)
    tokens = importlib.import_module("safetensors.torch").load_file(options.tokens)["tokens"]

    def forward(model: Any) -> None:
        with torch.no_grad():
            for windows in tokens.split(options.batch_size):
                model(input_ids=windows, use_cache=False)

    with stages("oneshot"):
        config = {"forward_loop": forward, "pattern": f"{options.sparsity} sparsity"}
        model = sparsity.export(sparsity.sparsify(model, "sparsegpt", config))
    with stages("save"):
        save_dense(model, tokenizer, options.out)
    seconds = {**stages.seconds, "solve": solves.seconds}
    return {"seconds": seconds, "solves": solves.calls, "tokens_shape": list(tokens.shape)}


if __name__ == "__main__":
    run("One SparseGPT run of NVIDIA Model Optimizer, timed from the inside.", PACKAGES, prune)
