"""What the peers' halves of `python -m eval.peers` share: a stopwatch, the flags, and how a model is written.

A worker is run as a script by its peer's own Python, so nothing here knows llmprune or imports it. What it measured
goes as JSON to `--report`; the pruned model goes to `--out` as a plain dense folder with exact zeros.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def load_dense(folder: str, threads: int) -> tuple[Any, Any]:
    """The dense model in float32 and its tokenizer."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def save_dense(model: Any, tokenizer: Any, out: Path, **options: Any) -> None:
    """Write a folder any loader reads: dense tensors, and a config that says nothing of compression."""
    model.save_pretrained(str(out), **options)
    tokenizer.save_pretrained(str(out))
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if key not in COMPRESSION_KEYS}
    config_path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def run(description: str, packages: Sequence[str], prune: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Read the flags, which `eval.peers` fills, prune, and write the report."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--model", required=True, help="folder of the dense model")
    flags.add_argument("--tokens", required=True, type=Path, help="frozen token file to calibrate on")
    flags.add_argument("--sparsity", required=True, help='either "N:M" (N of every M are pruned) or a fraction')
    flags.add_argument("--int4-group", type=int, help="quantise to int4 in groups of so many inputs instead")
    flags.add_argument("--round", action="store_true", help="with --int4-group: to the nearest values, without GPTQ")
    flags.add_argument("--batch-size", type=int, default=1, help="calibration windows a forward pass")
    flags.add_argument("--threads", type=int, default=1, help="CPU threads torch may use")
    flags.add_argument("--out", required=True, type=Path, help="folder that receives the pruned model")
    flags.add_argument("--report", required=True, type=Path, help="file that receives the measurements as JSON")
    options = flags.parse_args()
    report = prune(options) | {
        "threads": importlib.import_module("torch").get_num_threads(),
        "batch_size": options.batch_size,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
