"""The peer's half of `python -m eval.peers`: one SparseGPT run of LLM Compressor, timed from the inside.

It is run as a script by the peer's own Python, so it knows nothing of llmprune and imports nothing of it. What it
measured goes as JSON to `--report`; the pruned model goes to `--out` as a plain dense folder with exact zeros.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets", "safetensors", "numpy")
SOLVER_MODULE = "llmcompressor.modifiers.pruning.sparsegpt.base"
COMPRESSION_KEYS = ("quantization_config", "sparsity_config", "compression_config")


class Stopwatch:
    """Seconds and calls spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


def watch(module_name: str, function_name: str) -> Stopwatch:
    """Replace a module's function by its timed self; fails loudly where a new version has renamed it."""
    module = importlib.import_module(module_name)
    stopwatch = Stopwatch()
    setattr(module, function_name, stopwatch.wrap(getattr(module, function_name)))
    return stopwatch


def modifier(sparsity: str) -> Any:
    """SparseGPT on every linear layer but the head; `sparsity` is "N:M" (prunes N of M) or a fraction such as "0.5"."""
    if ":" in sparsity:
        pruned, group = (int(number) for number in sparsity.split(":"))
        options: dict[str, Any] = {"sparsity": pruned / group, "mask_structure": sparsity}
    else:
        options = {"sparsity": float(sparsity), "mask_structure": "0:0"}
    pruning = importlib.import_module("llmcompressor.modifiers.pruning")
    return pruning.SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **options)


def calibration(path: Path) -> tuple[Any, int, int]:
    """The frozen windows as an already tokenised dataset with full attention, and its (samples, length)."""
    tokens = importlib.import_module("safetensors.torch").load_file(path)["tokens"]
    samples, length = tokens.shape
    columns = {"input_ids": tokens.tolist(), "attention_mask": [[1] * length] * samples}
    return importlib.import_module("datasets").Dataset.from_dict(columns), samples, length


def save_dense(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a folder any loader reads: dense tensors, and a config that says nothing of compression."""
    model.save_pretrained(str(out), save_compressed=False)
    tokenizer.save_pretrained(str(out))
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if key not in COMPRESSION_KEYS}
    config_path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, prune, save; the seconds of each kept apart."""
    clock = time.perf_counter
    seconds: dict[str, float] = {}

    start = clock()
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    oneshot = importlib.import_module("llmcompressor").oneshot
    solves, grams = watch(SOLVER_MODULE, "sparsify_weight"), watch(SOLVER_MODULE, "accumulate_hessian")
    seconds["import"] = clock() - start

    torch.set_num_threads(arguments.threads)
    start = clock()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    seconds["load"] = clock() - start

    start = clock()
    dataset, samples, length = calibration(arguments.tokens)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier(arguments.sparsity),
        dataset=dataset,
        num_calibration_samples=samples,
        max_seq_length=length,
        batch_size=arguments.batch_size,
        shuffle_calibration_samples=False,
        pad_to_max_length=False,
    )
    seconds["oneshot"] = clock() - start

    start = clock()
    save_dense(model, tokenizer, arguments.out)
    seconds["save"] = clock() - start

    seconds["solve"], seconds["gram"] = solves.seconds, grams.seconds
    return {
        "seconds": seconds,
        "solves": solves.calls,
        "tokens_shape": [samples, length],
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def parser() -> argparse.ArgumentParser:
    """The worker's flags; eval.peers fills all of them."""
    flags = argparse.ArgumentParser(description="One SparseGPT run of LLM Compressor, timed from the inside.")
    flags.add_argument("--model", required=True, help="Folder of the dense model.")
    flags.add_argument("--tokens", required=True, type=Path, help="Frozen token file to calibrate on.")
    flags.add_argument("--sparsity", required=True, help='Either "N:M" (N of every M are pruned) or a fraction.')
    flags.add_argument("--batch-size", type=int, default=1, help="Calibration windows a forward pass.")
    flags.add_argument("--threads", type=int, default=1, help="CPU threads torch may use.")
    flags.add_argument("--out", required=True, type=Path, help="Folder that receives the pruned model.")
    flags.add_argument("--report", required=True, type=Path, help="File that receives the measurements as JSON.")
    return flags


if __name__ == "__main__":
    parsed = parser().parse_args()
    report = prune(parsed)
    parsed.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
