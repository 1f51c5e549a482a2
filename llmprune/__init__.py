"""Prune language models layer by layer, after training, without full-model backprop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune.bars import ProgressBars
    from llmprune.errors import InputError, PruneError
    from llmprune.finetune import KeepZeros, add_lora, merge_lora
    from llmprune.job import Job
    from llmprune.packing import load, pack, unpack
    from llmprune.progress import Progress
    from llmprune.report import PruneReport
    from llmprune.run import prune
    from llmprune.semistructured import accelerate
    from llmprune.upload import push

_WHERE = {
    "InputError": "errors",
    "Job": "job",
    "KeepZeros": "finetune",
    "Progress": "progress",
    "ProgressBars": "bars",
    "PruneError": "errors",
    "PruneReport": "report",
    "accelerate": "semistructured",
    "add_lora": "finetune",
    "load": "packing",
    "merge_lora": "finetune",
    "pack": "packing",
    "prune": "run",
    "push": "upload",
    "unpack": "packing",
}
__all__ = [
    "InputError",
    "Job",
    "KeepZeros",
    "Progress",
    "ProgressBars",
    "PruneError",
    "PruneReport",
    "accelerate",
    "add_lora",
    "load",
    "merge_lora",
    "pack",
    "prune",
    "push",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing the package imports no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    return getattr(import_module(f"llmprune.{_WHERE[name]}"), name)
