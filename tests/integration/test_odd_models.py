"""Models whose blocks do what few do are pruned right, or refused before anything is pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LENGTH,
    Plain,
    Toy,
    ToyConfig,
    job,
    random_tokens,
    reload,
    save_tiny,
    skeleton_of,
    stream_through,
    streamed_logits,
    text_file,
    token_file,
    toy_block,
    whole_logits,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from llmprune import PruneReport, prune
from llmprune.errors import InputError, PruneError
from llmprune.model.selection import make_plan
from llmprune.pruning.pattern import NM
from llmprune.streaming.block_types import all_couplings
from llmprune.streaming.capture import logits
from llmprune.streaming.stream import BlockStream

ROUTER, SHARED, NEVER = "router", "shared between blocks", "never called"
OTHER, TWICE, UNCALLED = (
    "another product than of weight and input", "called more than once in a block", "weight used without a call",
)  # fmt: skip
ROUTERS = {
    "dbrx": ["ffn.router.layer"],
    "deepseek_v3": ["mlp.gate"],
    "gemma3n_text": ["altup.modality_router"],
    "hunyuan_v1_moe": ["mlp.gate.wg"],
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
    "longcat_flash": ["mlp.router.classifier"],
    "mixtral": ["mlp.gate"],
    "zaya": [f"mlp.gate.{name}" for name in ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")],
}
"""Where their routers are, among what may be there."""
CASES = [
    "axk2", "bart", "dbrx", "deepseek_v4", "falcon_mamba", "gemma3n_text", "hunyuan_v1_moe", "hy_v4", "jetmoe",
    "longcat_flash", "recurrent_gemma", "rwkv", "xlnet", "zamba", "zamba2", "zaya",
]  # fmt: skip
REASONS = {
    "bart": {NEVER},
    "dbrx": {ROUTER},
    "deepseek_v4": {OTHER, "not a linear layer"},
    "falcon_mamba": {"convolution", "not a linear layer", UNCALLED},
    "gemma3n_text": {ROUTER},
    "recurrent_gemma": {"convolution", "not a linear layer"},
    "rwkv": {"not a linear layer"},
    "xlnet": {"not a linear layer"},
    "zaya": {ROUTER, TWICE, "convolution"},
}
"""What is said of the weights that stay dense."""


@dataclass(frozen=True)
class Run:
    """A source, and what a run with its default evaluation made of it."""

    name: str
    source: Path
    out: Path
    report: PruneReport
    text: Path


def run_of(name: str, work: Path, sparsity: str = "2:4", **options: Any) -> Run:
    source, out = save_tiny(name, work / "source"), work / "out"
    text = text_file(work / "text.txt")
    wanted = {"samples": 4, "seq_len": 24, "effort": "fast"} | options
    evaluated = {"evaluate": True, "eval_text": str(text), "eval_context": 32, "eval_windows": 3}
    return Run(name, source, out, prune(job(source, out, text, sparsity, **evaluated, **wanted)), text)


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(request.param, tmp_path_factory.mktemp("odd"))


def test_the_dense_stream_is_bit_equal_to_the_whole_model(run: Run) -> None:
    tokens = random_tokens(3)
    assert torch.equal(streamed_logits(skeleton_of(run.source), tokens), whole_logits(reload(run.source), tokens))


def test_perplexities_are_those_of_plain_transformers(run: Run) -> None:
    ids = torch.tensor([int(word[1:]) for word in run.text.read_text().split()])[: 3 * 32].view(3, 32)
    assert run.report.evaluation is not None
    for folder, key in ((run.source, "dense"), (run.out, "pruned")):
        scores = whole_logits(reload(folder), ids)[:, :-1].double()
        loss = functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
        assert run.report.evaluation[key]["value"] == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_routers_stay_dense(run: Run) -> None:
    dense, pruned = reload(run.source).state_dict(), reload(run.out).state_dict()
    routers = [name for name in dense for part in ROUTERS.get(run.name, []) if name.endswith(f"{part}.weight")]
    assert bool(routers) == (run.name in ROUTERS)
    assert all(torch.equal(dense[name], pruned[name]) for name in routers)
    assert not {f"{layer.name}.weight" for layer in run.report.layers} & set(routers)
    assert run.report.coverage["skipped"].get(ROUTER, 0) == sum(dense[name].numel() for name in routers)


def test_every_weight_is_counted_once_and_every_reason_is_true(run: Run) -> None:
    prefix, coverage = f"{skeleton_of(run.source).block_path}.", run.report.coverage
    # A tensor that blocks share is one weight.
    inside = {name: p for name, p in reload(run.source).named_parameters() if name.startswith(prefix)}
    assert coverage["block_parameters"] == sum(map(torch.numel, inside.values()))
    matrices = sum(tensor.numel() for tensor in inside.values() if tensor.dim() > 1)
    assert coverage["covered"] + sum(coverage["skipped"].values()) == matrices
    assert coverage["covered"] == sum(math.prod(layer.shape) for layer in run.report.layers)
    assert set(coverage["skipped"]) == REASONS.get(run.name, set(coverage["skipped"]))


STATE_SPACE = [
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2_moe", "mamba2", "minimax",
    "olmo_hybrid", "qwen3_5_text", "qwen3_next", "xlstm",
]  # fmt: skip
"""Models with blocks that hold a state instead of keys and values, beside those that are run whole."""


@pytest.mark.parametrize("name", STATE_SPACE)
def test_blocks_with_a_state_stream_bit_equal_and_all_their_linear_layers_are_planned(
    name: str, tmp_path: Path
) -> None:
    folder, tokens = save_tiny(name, tmp_path / "source", tokenizer=False), random_tokens(3)
    skeleton, whole = skeleton_of(folder), reload(folder)
    assert torch.equal(streamed_logits(skeleton, tokens), whole_logits(whole, tokens))
    plan = make_plan(skeleton_of(folder), NM(2, 4))
    dense = {item.name for item in plan.skipped if item.reason == ROUTER}
    linear = [
        module
        for module, part in whole.named_modules()
        if isinstance(part, nn.Linear) and module.startswith(f"{skeleton.block_path}.") and module not in dense
    ]
    assert [layer.name for layer in plan.layers if layer.expert is None] == linear
    assert not [module for module in linear if "experts" in module and "shared" not in module]


@pytest.mark.parametrize("at_once", [2, 1])
@pytest.mark.parametrize("name", ["zaya", "gemma3n_text", "xlnet"])
def test_a_stopped_stream_goes_on_with_what_earlier_blocks_returned(name: str, at_once: int, tmp_path: Path) -> None:
    """Router states, and hidden states of other shapes: with the same batches, and with smaller ones."""
    folder, tokens = save_tiny(name, tmp_path / "source", tokenizer=False), random_tokens(4)
    whole = streamed_logits(skeleton_of(folder), tokens)

    def stream(**options: Any) -> BlockStream:
        return stream_through(skeleton_of(folder), tokens, folder=tmp_path, **options)

    first = stream(batch_tokens=2 * LENGTH)
    blocks = iter(first)
    next(blocks).finish()
    saved = first.save()
    if name != "xlnet" and at_once == 1:
        with pytest.raises(PruneError, match="state from block to block"):
            stream(batch_tokens=LENGTH, saved=saved)
        return
    resumed = stream(batch_tokens=at_once * LENGTH, saved=saved)
    for _ in resumed:
        pass
    skeleton = resumed.skeleton
    with skeleton.loaded(skeleton.outside()):
        found = [logits(skeleton, batch.tokens, batch.hidden, resumed.inputs.wrap) for batch in resumed.inputs.batches]
    assert torch.allclose(torch.cat(found), whole, atol=1e-5 if at_once == 1 else 0)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("hrm_text", {}, r"calls 'model\.L_module\.layers\.0' once more"),
        ("reformer", {}, "return ReformerOutput, not hidden states"),
        ("blt", {}, "take hidden states of shapes"),
        ("falcon_mamba", {"sparsity": "channels:50%"}, "no MLP channels could be traced"),
    ],
)
def test_what_cannot_be_streamed_or_cut_is_refused(
    name: str, options: dict[str, str], error: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=error) as caught:
        run_of(name, tmp_path, **options)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.partial"))


@toy_block
class Counting(nn.Module):
    """Its output depends on how often a block has run before it: state that no argument and no return value shows."""

    calls = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return x + Counting.calls * self.down(self.up(x).relu())


def test_a_stream_that_differs_from_the_whole_model_is_refused_with_the_block_and_the_difference(
    tmp_path: Path,
) -> None:
    source = save_tiny("toy", tmp_path / "source", kind="Counting", tokenizer=False)
    with pytest.raises(InputError, match=r"the output of 'layers\.0' differs by [\d.]+%"):
        prune(job(source, tmp_path / "out", token_file(tmp_path / "tokens.safetensors")))
    assert not (tmp_path / "out").exists()


class HandingConfig(ToyConfig):
    """Four blocks, each handing a state to the one so many steps behind it."""

    model_type = "handing"

    def __init__(self, steps: int = 1, **kwargs: Any) -> None:
        self.steps = steps
        super().__init__(**kwargs)


class Handing(Plain):
    """Returns a state for a later block, and takes one of an earlier one."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = self.up(x).relu()
        return x + self.down(state if before is None else state + before), state


class HandingModel(Toy):
    """Hands on the states."""

    config_class = HandingConfig

    def __init__(self, config: HandingConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Handing(config.hidden_size) for _ in range(4))
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: Any) -> CausalLMOutput:
        hidden, states = self.embed(input_ids), [None] * self.config.steps
        for layer in self.layers:
            hidden, state = layer(hidden, before=states[-self.config.steps])
            states.append(state)
        return CausalLMOutput(logits=self.head(hidden))


AutoConfig.register("handing", HandingConfig)
AutoModelForCausalLM.register(HandingConfig, HandingModel)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_a_block_returns_for_a_later_one_is_carried_to_it(steps: int, tmp_path: Path) -> None:
    source = save_tiny("handing", tmp_path / "source", steps=steps, kind="Plain", tokenizer=False)
    tokens = random_tokens()
    assert torch.equal(streamed_logits(skeleton_of(source), tokens), whole_logits(reload(source), tokens))
    report = prune(job(source, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), effort="balanced"))
    assert len(report.layers) == 8
    pruned = tmp_path / "out"
    assert torch.equal(streamed_logits(skeleton_of(pruned), tokens), whole_logits(reload(pruned), tokens))


def test_a_state_is_kept_until_its_last_user_has_run(tmp_path: Path) -> None:
    source = save_tiny("handing", tmp_path / "source", steps=2, kind="Plain", tokenizer=False)
    stream = stream_through(skeleton_of(source), random_tokens())
    kept = []
    for block in stream:
        kept.append(sorted(block.batches[0].calls[block.index].returned))
    assert kept == [[], [(0, 0)], [(0, 0), (1, 0)], [(1, 0)]]


def test_a_permutation_that_an_indexer_would_see_is_not_applied(tmp_path: Path) -> None:
    """More tokens than it chooses among: the reloaded model computes what the run computed."""
    run = run_of("axk2", tmp_path, permute=True)
    skeleton, tokens = skeleton_of(run.out), random_tokens(2, 48)
    assert skeleton.config.index_topk < 48
    couplings = all_couplings(skeleton_of(run.source), tokens).of
    consumers = {coupling.consumer.rpartition(".")[2] for found in couplings for coupling in found}
    # Its input is made of the very tensor that the indexer reads.
    assert "q_gate_proj" not in consumers
    assert "o_proj" in consumers
    assert torch.equal(streamed_logits(skeleton, tokens), whole_logits(reload(run.out), tokens))


def test_hidden_states_of_several_streams_are_pruned_against_the_dense_model(tmp_path: Path) -> None:
    """The residual stream `(batch, tokens, streams, hidden)` is no contiguous tensor, its routed rows neither."""
    run = run_of("deepseek_v4", tmp_path, effort="balanced")
    skeleton, tokens = skeleton_of(run.out), random_tokens(2, 48)
    assert torch.equal(streamed_logits(skeleton, tokens), whole_logits(reload(run.out), tokens))
    assert run.report.recipe["targets"] == "dense"
    assert all(math.isfinite(layer.error) for layer in run.report.layers)


def test_removing_channels_of_a_mixture_says_which_experts_keep_theirs(tmp_path: Path) -> None:
    run = run_of("longcat_flash", tmp_path, "channels:50%")
    state = reload(run.source).state_dict()
    inside = {name: tensor for name, tensor in state.items() if ".layers." in name}
    fused = sum(tensor.numel() for name, tensor in inside.items() if ".experts." in name)
    share = fused / sum(tensor.numel() for tensor in inside.values())
    assert f"the experts, {share:.1%} of the block parameters, keep all of theirs" in f"{run.report.to_json()}"
