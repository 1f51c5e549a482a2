"""A refined block is nearer to the dense one on unseen batches, or it is the block as it was; masks hold exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import BATCH, chosen, random_tokens, reload, save_tiny, skeleton_of, stream_through, whole_logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from variants import prune_group

from llmprune.pruning.problem import InputStats
from llmprune.reporting.report import BlockReconstruction
from llmprune.runtime.process_group import SINGLE
from llmprune.streaming import block_reconstruction as module
from llmprune.streaming.batch import Batch, hidden_of
from llmprune.streaming.batch_shards import held_out_batches, validation_batches
from llmprune.streaming.block import Block
from llmprune.streaming.block_reconstruction import Peers, batch_tokens, reconstruct_block

SAMPLES = 16


def refined(
    folder: Path, epochs: int, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[BlockReconstruction], Tensor]:
    """Weights before and after refinement, what was gained, and what leaves the last block.

    What is said to be gained is what the stored block gives on the validation batches, by the loss's formula.
    """
    skeleton = skeleton_of(folder, dtype=dtype)
    tokens = random_tokens(SAMPLES)
    stream = stream_through(
        skeleton,
        tokens,
        batch_tokens=BATCH * tokens.shape[1],
        chosen=chosen(skeleton),
        dense_stream=True,
        reconstruct=True,
    )
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    gained = []
    for block in stream:
        for group in stream.groups(block):
            prune_group(group)
        before |= {name: tensor.clone() for name, tensor in block.changed.items()}
        peers = Peers(SINGLE, stream.sharding.batches)
        start = loss_of(block, peers)
        gained.append(reconstruct_block(block, peers, epochs, seed))
        assert gained[-1].before == pytest.approx(start, rel=1e-5)
        assert gained[-1].after == pytest.approx(loss_of(block, peers), rel=1e-5)
        after |= block.changed
    return before, after, gained, torch.cat([batch.hidden for batch in stream.inputs.batches])


@torch.no_grad()
def loss_of(block: Block, peers: Peers) -> float:
    """On the validation batches, of the block as it is stored: its outputs against the dense block's, in float64."""
    given = {name.removeprefix(f"{block.name}."): tensor for name, tensor in block.changed.items()}
    for local, tensor in given.items():
        assert torch.equal(block.module.get_parameter(local), tensor.to(block.skeleton.compute))
    dense = {batch.shard.batch: batch.dense.double() for batch in block.batches if batch.dense is not None}
    energy = torch.stack([target.square().mean((0, 1)) for target in dense.values()]).mean(0)
    weights = (energy / energy.mean()).clamp(min=1e-6) ** -0.5
    losses = []
    for batch in block.batches:
        if batch.shard.batch in validation_batches(peers.batches):
            call, target = batch.calls[block.index], dense[batch.shard.batch]
            output = hidden_of(block.module(batch.entered(), *call.args, **call.kwargs)).double()
            missed = ((output - target).square() * weights).sum(-1) / (target.square() * weights).sum(-1)
            losses.append(float(missed.mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("rate", [module.RATE, 3e-4, 1e-4])
def test_what_counts_are_the_weights_as_the_file_holds_them(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small steps gain less than rounding to bfloat16 costs; then the block stays as it was."""
    monkeypatch.setattr(module, "RATE", rate)
    save_tiny("llama", tmp_path, tokenizer=False)
    before, after, gained, _ = refined(tmp_path, 1, dtype=torch.bfloat16)
    for gain in gained:
        names = [name for name in before if name.startswith(f"{gain.block}.")]
        assert names
        assert all(torch.equal(before[name], after[name]) for name in names) == (gain.after == gain.before)


def test_a_block_with_nothing_to_train_is_left_alone(tmp_path: Path) -> None:
    """OLMo's norms have no weights and its layers no biases."""
    save_tiny("olmo", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    first = frozenset(name for name in chosen(skeleton) if ".0." in name)
    tokens = random_tokens(SAMPLES)
    stream = stream_through(
        skeleton, tokens, batch_tokens=BATCH * tokens.shape[1], chosen=first, dense_stream=True, reconstruct=True
    )
    gained = []
    for block in stream:
        for group in stream.groups(block):
            prune_group(group)
        gained.append(reconstruct_block(block, Peers(SINGLE, stream.sharding.batches), 1))
    assert gained[0].after < gained[0].before
    assert gained[1].after == gained[1].before


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "bloom", "qwen2_moe"])
def test_refined_blocks_are_nearer_to_the_dense_ones_and_keep_their_zeros(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    before, after, gained, hidden = refined(tmp_path, 4)
    assert sum(gain.after for gain in gained) < 0.97 * sum(gain.before for gain in gained)
    for name, weight in before.items():
        assert bool((after[name][weight == 0] == 0).all()), name
        assert not torch.equal(after[name], weight)
    assert set(after) - set(before)  # the norms
    assert torch.isfinite(hidden).all()


def test_the_stream_goes_on_with_the_refined_block(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    _, after, _, hidden = refined(tmp_path, 1)
    plain = reload(tmp_path)
    for name, tensor in after.items():
        plain.get_parameter(name).data.copy_(tensor)
    seen: list[Tensor] = []
    plain.model.layers[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    whole_logits(plain, random_tokens(SAMPLES))
    assert torch.allclose(torch.cat(seen), hidden, rtol=1e-4, atol=1e-4)


def test_a_block_that_gains_nothing_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATE", 100.0)
    save_tiny("llama", tmp_path, tokenizer=False)
    before, after, gained, _ = refined(tmp_path, 1)
    assert all(gain.after == gain.before for gain in gained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_same_seed_same_bytes_another_seed_another_order(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    first, again, other = (refined(tmp_path, 1, seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def embedding_without(folder: Path, token: int) -> None:
    """The embedding of a token becomes zero."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_token_whose_output_is_zero_does_no_harm(tmp_path: Path) -> None:
    """First in its window, a token without an embedding stays zero through all blocks."""
    save_tiny("llama", tmp_path, tokenizer=False, attention_bias=False)
    _, _, plain, _ = refined(tmp_path, 2)
    embedding_without(tmp_path, int(random_tokens(SAMPLES)[0, 0]))
    _, _, gained, hidden = refined(tmp_path, 2)
    assert bool((hidden[0, 0] == 0).all())
    for gain, expected in zip(gained, plain, strict=True):
        assert gain.after / gain.before == pytest.approx(expected.after / expected.before, rel=0.05)
        assert gain.skipped_steps == 0


def test_steps_with_gradients_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    steps = iter(range(1000))
    find = module.gradients_of

    def sometimes_nan(loss: Tensor, values: list[nn.Parameter]) -> tuple[Tensor, ...]:
        found = find(loss, values)
        if next(steps) % 3 == 0:
            found[0][0] = torch.nan
        return found

    monkeypatch.setattr(module, "gradients_of", sometimes_nan)
    *_, gained, _ = refined(tmp_path, 2)
    assert all(gain.after < gain.before for gain in gained)
    assert all(gain.skipped_steps > 1 for gain in gained)


class SmallPart(module.BlockLoss):
    """As if a batch had so many more tokens, and these were done to perfection."""

    def __call__(self, batch: Batch, values: Mapping[str, Tensor] | None = None) -> Tensor:
        return super().__call__(batch, values) * 2.0**-10


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
def test_gradients_do_not_vanish_in_half_precision(compute: torch.dtype, tmp_path: Path) -> None:
    """Of a block that is nearly right already: as a mean over many tokens, each has next to no part."""
    save_tiny("llama", tmp_path, tokenizer=False)
    found = []
    for dtype in (torch.float32, compute):
        skeleton = skeleton_of(tmp_path, compute=dtype)
        stream = stream_through(
            skeleton, random_tokens(SAMPLES), chosen=chosen(skeleton), dense_stream=True, reconstruct=True
        )
        blocks = iter(stream)
        block = next(blocks)
        block.finish()
        values = {name: nn.Parameter(value.float() * 1.01) for name, value in block.module.named_parameters()}
        gradients = SmallPart(block, values, Peers(SINGLE, stream.sharding.batches)).gradients(0)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.98


def test_no_epochs_change_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    before, after, _, _ = refined(tmp_path, 0)
    assert before.keys() == after.keys()


def test_an_expert_without_tokens_in_a_batch_stays_as_it_is_in_that_step(tmp_path: Path) -> None:
    save_tiny("toy", tmp_path, kind="Experts", hidden_size=16, tokenizer=False)
    before, after, _, _ = refined(tmp_path, 2)
    for name in before:
        if ".experts.2." in name and name.endswith(".weight"):
            assert torch.equal(before[name], after[name])


def test_without_dense_targets_the_statistics_are_those_of_the_pruned_model_alone(tmp_path: Path) -> None:
    """A second stream that only refinement needs changes neither the solves nor their errors."""
    save_tiny("llama", tmp_path, tokenizer=False)
    seen = []
    for twin in (False, True):
        skeleton = skeleton_of(tmp_path)
        stream = stream_through(
            skeleton, random_tokens(), chosen=chosen(skeleton), dense_stream=twin, dense_targets=False
        )
        for block in stream:
            for group in stream.groups(block):
                assert group.problem.stats.cross is None
                assert group.problem.stats.residual_cross is None
                seen.append(group.problem.stats.gram)
                prune_group(group)
    half = len(seen) // 2
    assert all(torch.equal(alone, beside) for alone, beside in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize(("shape", "size"), [((32, 512), 1024), ((8, 512), 256), ((1, 4), 1)])
def test_batches_are_small_enough_for_many_steps(shape: tuple[int, int], size: int) -> None:
    assert batch_tokens(math.prod(shape)) == size


@pytest.mark.parametrize("batches", [1, 2, 8, 9, 15, 16, 17, 24, 25, 128])
def test_validation_batches_are_few_and_some_are_left_to_train_on(batches: int) -> None:
    found = validation_batches(batches)
    assert 1 <= len(found) <= max(1, batches // 8)
    assert set(found) <= set(range(batches))
    assert held_out_batches(batches) == (frozenset(found) if batches >= 16 else frozenset())


@pytest.mark.parametrize(("samples", "left_out"), [(16, [8]), (30, [8, 24]), (15, [])])
def test_the_solves_do_not_see_the_validation_batches(samples: int, left_out: list[int], tmp_path: Path) -> None:
    """The statistics are those of a text without them, in every group of every block."""
    save_tiny("llama", tmp_path, tokenizer=False)
    tokens = random_tokens(samples)
    rest = tokens[[at for at in range(samples) if at not in left_out]]
    seen: list[list[InputStats]] = []
    for text, again in ((tokens, True), (rest, False)):
        skeleton = skeleton_of(tmp_path)
        stream = stream_through(
            skeleton, text, batch_tokens=text.shape[1], chosen=chosen(skeleton), dense_stream=True, reconstruct=again
        )
        seen.append([])
        for block in stream:
            for group in stream.groups(block):
                seen[-1].append(replace(group.problem.stats, gram=group.problem.stats.gram.clone()))
                prune_group(group)
    assert all(one.tokens == other.tokens == rest.numel() for one, other in zip(*seen, strict=True))
    assert all(torch.allclose(one.gram, other.gram, rtol=1e-4, atol=1e-5) for one, other in zip(*seen, strict=True))
