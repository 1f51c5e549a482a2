"""The worker of `eval.speed --engine llama.cpp`: a model in a GGUF file, timed by llama.cpp itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmprune.cli.shell import say
from llmprune.runtime.memory import peak_memory


def serve_gguf(task: dict[str, Any]) -> None:
    """Answer every line of stdin with a line of JSON.

    Args:
        task: the file as `folder`, and the settings of `eval.speed`.
    """
    path = Path(task["folder"])
    server = _server(path, task)
    prompt = [3 + at * 7919 % (_tokens(path) - 3) for at in range(task["prompt"])]
    for line in sys.stdin:
        answer = _timed(server, prompt, task["new"]) if line.strip() == "turn" else _measured(path)
        say(json.dumps(answer))


def _server(path: Path, task: dict[str, Any]) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel, settings.verbosity = str(path), 1, -1
    settings.n_ctx = task["prompt"] + task["new"] + 8
    if task["threads"]:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = task["threads"]
    return xllamacpp.Server(settings)


def _tokens(path: Path) -> int:
    """Number of rows of the embedding matrix."""
    from llmprune.sources.gguf_header import read_gguf_header

    return read_gguf_header(path).shapes["token_embd.weight"][-1]


def _timed(server: Any, prompt: list[int], new: int) -> dict[str, float]:
    """Tokens per second of a prefill, and of greedy decoding after it, by llama.cpp's own clock."""
    asked = {"prompt": prompt, "n_predict": new, "temperature": 0.0, "ignore_eos": True}
    times = server.handle_completions({**asked, "cache_prompt": False, "stream": False})["timings"]
    return {"prefill": times["prompt_per_second"], "decode": times["predicted_per_second"]}


def _measured(path: Path) -> dict[str, Any]:
    """Peak memory of the process, and the size of the file; operations are not counted."""
    return {"memory": peak_memory(), "flops": None, "size": path.stat().st_size}
