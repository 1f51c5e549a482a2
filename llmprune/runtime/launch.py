"""Joins the processes that a launcher has started into a process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

from llmprune.errors import InputError
from llmprune.runtime.process_group import ProcessGroup

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one measures perplexity while the others wait, which may take hours."""


@contextmanager
def launch(device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """The process group that torchrun or accelerate has started; without these, of one process.

    Args:
        device: as the user named it.

    Yields:
        the processes, and the device of this one.

    Raises:
        InputError: their number is not what the launcher says.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted == 1:
        yield ProcessGroup(), device
        return
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # On a machine without a GPU, only the state that is told so joins the others.
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != wanted:
        raise InputError(
            f"WORLD_SIZE is {wanted}, but {state.num_processes} of its processes have met",
            "start with: torchrun --nproc-per-node N -m llmprune ...",
        )
    try:
        place = "cpu" if cpu else str(state.device)
        yield ProcessGroup(state.process_index, state.num_processes, place), place
    finally:
        state.destroy_process_group()
