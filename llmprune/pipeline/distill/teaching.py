"""What a distillation learns from: windows of text, windows that the teacher generates, the teacher's probabilities."""

from __future__ import annotations

from contextlib import suppress

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pipeline.distill.context import DistillContext
from llmprune.pipeline.distill.state import TOP
from llmprune.pipeline.state import GENERATED
from llmprune.progress import Progress
from llmprune.runtime.files import replacing
from llmprune.sources.generated import generated_batch
from llmprune.sources.tokens import TokenBatch, load_tokens, save_tokens
from llmprune.training.distillation import Cached, Recomputed, Teacher
from llmprune.training.divergence import Top

GENERATOR = "the teacher"


def generated_windows(run: DistillContext, progress: Progress) -> TokenBatch | None:
    """The windows that the teacher generates, the same in all processes; None for none. They are kept for a resume."""
    windows, text = run.generated_windows, run.data.calibration
    if not windows:
        return None
    length, vocabulary = text.tokens.shape[1], run.source.config.get_text_config().vocab_size
    kept = run.workdir / GENERATED
    if run.group.is_main:
        found = None
        with suppress(InputError):
            found = load_tokens(kept, windows, length, vocabulary)
        if found is None:
            save_tokens(generated_batch(run.teacher, text, windows, (run.job.seed, GENERATOR), progress), kept)
    run.group.barrier()
    return load_tokens(kept, windows, length, vocabulary)


def all_windows(run: DistillContext, generated: TokenBatch | None) -> Tensor:
    """All windows to train on, generated ones shuffled among those of the text; of whole steps only."""
    text = run.data.calibration.tokens
    both = text if generated is None else torch.cat([text, generated.tokens])
    if generated is not None:
        both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(run.job.seed))]
    return both[: len(both) // run.job.batch_size * run.job.batch_size]


def teacher_of(run: DistillContext, windows: Tensor, model: Recomputed, progress: Progress) -> Teacher:
    """What training learns from: the model itself for one pass, its largest probabilities for several.

    Args:
        run: the job.
        windows: all that is trained on, `(windows, length)`.
        model: the teacher, its weights in memory.
        progress: of a pass of the teacher over the windows.
    """
    if not run.top_k:
        return model
    path = run.workdir / TOP
    if run.group.is_main and not path.exists():
        progress.start("asking the teacher", len(windows))
        tops = []
        for window in windows:
            with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
                top = model.top(window[None].to(run.device), run.top_k, run.job.temperature)
            tops.append((top.tokens.cpu(), top.logarithms.half().cpu()))
            progress.step()
        tokens, logarithms = (torch.stack(parts) for parts in zip(*tops, strict=True))
        with replacing(path) as temporary:
            save_file({"tokens": tokens, "logarithms": logarithms}, temporary)
        progress.finish()
    run.group.barrier()
    with safe_open(path, framework="pt") as file:
        kept = Top(file.get_tensor("tokens"), file.get_tensor("logarithms"))
    return Cached(lambda row: Top(kept.tokens[row], kept.logarithms[row].float()))
