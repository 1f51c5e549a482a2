"""Prune language models layer by layer, after training, without full-model backprop."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune.cli.notebook import ProgressBars
    from llmprune.distill_job import DistillJob
    from llmprune.errors import InputError, PruneError
    from llmprune.export.acceleration import accelerate
    from llmprune.export.pack import load, pack, unpack
    from llmprune.export.upload import push
    from llmprune.job import Job
    from llmprune.pipeline.distill.run import distill
    from llmprune.progress import Progress
    from llmprune.reporting.report import PruneReport
    from llmprune.run import prune
    from llmprune.training.keep_zeros import KeepZeros
    from llmprune.training.lora import add_lora, merge_lora

if missing := [name for name in ("fcntl", "resource") if find_spec(name) is None]:
    raise ImportError(
        f"llmprune runs on Linux and macOS: this system's Python has no {' and no '.join(missing)}. "
        "On Windows, use the Windows Subsystem for Linux."
    )

_WHERE = {
    "DistillJob": "distill_job",
    "InputError": "errors",
    "Job": "job",
    "KeepZeros": "training.keep_zeros",
    "Progress": "progress",
    "ProgressBars": "cli.notebook",
    "PruneError": "errors",
    "PruneReport": "reporting.report",
    "accelerate": "export.acceleration",
    "add_lora": "training.lora",
    "distill": "pipeline.distill.run",
    "load": "export.pack",
    "merge_lora": "training.lora",
    "pack": "export.pack",
    "prune": "run",
    "push": "export.upload",
    "unpack": "export.pack",
}
__all__ = [
    "DistillJob",
    "InputError",
    "Job",
    "KeepZeros",
    "Progress",
    "ProgressBars",
    "PruneError",
    "PruneReport",
    "accelerate",
    "add_lora",
    "distill",
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


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
