"""Tensors in files keep their values when their memory is given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from llmprune.errors import PruneError
from llmprune.runtime.mapped import MappedFile, release_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_stay_when_memory_is_given_back(dtype: torch.dtype, tmp_path: Path) -> None:
    file = MappedFile((3, 500, 700), dtype, tmp_path)
    values = torch.randn(3, 500, 700).to(dtype)
    file.tensor.copy_(values)
    file.release()
    release_pages(file.tensor[1])
    assert torch.equal(file.tensor, values)
    assert not list(tmp_path.iterdir())


def test_other_tensors_are_left_alone() -> None:
    tensor = torch.ones(1000)
    release_pages(tensor)
    assert bool((tensor == 1).all())


def test_the_tensor_outlives_its_file(tmp_path: Path) -> None:
    tensor = MappedFile((10,), torch.float32, tmp_path).tensor.fill_(2)
    gc.collect()
    release_pages(tensor)
    assert bool((tensor == 2).all())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no such call")
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PruneError, match=r"cannot write 40 bytes of pruned experts .*No space left"):
        MappedFile((10,), torch.float32, tmp_path)
