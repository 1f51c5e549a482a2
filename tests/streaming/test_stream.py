"""A stream gives every layer the inputs that the pruned layers before it produce, whichever way it goes about it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from helpers import (
    BATCH,
    LENGTH,
    TOY_BLOCKS,
    Plain,
    chosen,
    edit_tensor,
    parameter_of,
    random_tokens,
    recorded_inputs,
    reload,
    save_tiny,
    skeleton_of,
    stream_through,
    streamed_logits,
    toy_block,
    whole_logits,
)
from torch import Tensor, nn
from variants import prune_group

from llmprune.errors import InputError
from llmprune.pruning.problem import InputStats, LayerSolution, Status
from llmprune.streaming.stream import BlockStream

MODES = {"pausing": 2**30, "repeating": 0}
every_mode = pytest.mark.parametrize("memory", MODES.values(), ids=MODES)
FAMILIES = ["llama", "gemma3_text", "gpt2", "cohere", "falcon", "bloom", "opt", "qwen2_moe", "gptj"]


def stream_of(folder: Path, tokens: Tensor, memory: int = 2**30, dense: bool = False) -> BlockStream:
    skeleton = skeleton_of(folder)
    batch_tokens = BATCH * tokens.shape[1]
    names = chosen(skeleton)
    return stream_through(
        skeleton, tokens, batch_tokens=batch_tokens, chosen=names, block_memory=memory, dense_stream=dense
    )


def pruned(stream: BlockStream) -> tuple[dict[str, Tensor], dict[str, LayerSolution], Tensor]:
    """Prune all blocks: stored weights and solutions by name, and what leaves the last block."""
    stored: dict[str, Tensor] = {}
    solutions: dict[str, LayerSolution] = {}
    for block in stream:
        for group in stream.groups(block):
            solutions |= dict(zip((ref.name for ref in group.refs), prune_group(group), strict=True))
        stored |= block.changed
    return stored, solutions, torch.cat([batch.hidden for batch in stream.inputs.batches])


class Pair(nn.Module):
    """Two layers as wide as the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)


@toy_block
class Fickle(Pair):
    """The order of its layers depends on the text."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.one, self.two) if float(x.sum()) > 0 else (self.two, self.one)
        return x + second(first(x).relu())


@toy_block
class Twice(Pair):
    """Calls a layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(self.two(self.one(x)).relu())


@toy_block
class Keyword(nn.Module):
    """Hands its layer the input by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(input=x)


@toy_block
class Uncalled(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(self.one(x).relu() @ self.two.weight.T)


@toy_block
class Cast(Pair):
    """Computes in another dtype by autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.two(self.one(x).relu()).float()


@toy_block
class Swapped(Pair):
    """Puts another bias in place while its layer runs, as some state-space models did."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.two.bias.data
        self.two.bias.data = torch.zeros_like(bias)
        y = self.two(self.one(x).relu())
        self.two.bias.data = bias
        return x + y + bias


@pytest.fixture(autouse=True)
def _own_autocast() -> Iterator[None]:
    """Whatever a test does to the autocast state stays in it."""
    yield
    torch.set_autocast_enabled("cpu", False)


def toy(folder: Path, kind: str, **options: int) -> Path:
    return save_tiny("toy", folder, kind=kind, hidden_size=16, tokenizer=False, **options)


TOYS = ["Plain", "Experts", "Twice", "Keyword", "Uncalled", "Cast"]


def save(name: str, folder: Path) -> Path:
    return toy(folder, name) if name in TOY_BLOCKS else save_tiny(name, folder, tokenizer=False)


@pytest.mark.parametrize("name", [*FAMILIES, "mamba", "jamba", "lfm2", *TOYS])
def test_pausing_and_repeating_are_bit_equal(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    tokens = random_tokens()
    results = []
    for memory in MODES.values():
        results.append(pruned(stream_of(tmp_path, tokens, memory)))
        assert not torch.is_autocast_enabled("cpu")
    (a, solutions, x), (b, _, y) = results
    assert a.keys() == b.keys() == {parameter_of(reload(tmp_path), layer) for layer in solutions}
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(x, y)


@every_mode
@pytest.mark.parametrize("name", [*FAMILIES, "mamba", "jamba", "lfm2", *TOYS, "Fickle"])
def test_what_leaves_a_block_is_what_its_stored_weights_compute(name: str, memory: int, tmp_path: Path) -> None:
    save(name, tmp_path)
    stream = stream_of(tmp_path, random_tokens(), memory)
    for block in stream:
        before = [batch.hidden for batch in block.batches]
        calls = [batch.calls[block.index] for batch in block.batches]
        for group in stream.groups(block):
            prune_group(group)
        disk = stream.skeleton.checkpoint
        state = {n: block.changed.get(n, disk[n]) for n in stream.skeleton.block_parameters(block.index)}
        with torch.no_grad():
            for parameter, value in state.items():
                stream.skeleton.model.get_parameter(parameter).copy_(value)
            for batch, hidden, call in zip(block.batches, before, calls, strict=True):
                out = call.run(block.module, hidden)
                assert torch.equal(batch.hidden, out if isinstance(out, Tensor) else out[0])


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def forwards(folder: Path, memory: int) -> tuple[list[int], int, int]:
    """Forwards of every block, number of batches, number of groups."""
    stream = stream_of(folder, random_tokens(), memory)
    spent, groups = [], 0
    for block in stream:
        groups = 0
        with counted(block.module) as calls:
            for group in stream.groups(block):
                prune_group(group)
                groups += 1
        spent.append(len(calls))
    return spent, len(stream.inputs.batches), groups


def test_a_pausing_block_costs_one_forward_a_batch_and_its_kind_one_more(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=3, tokenizer=False)
    assert forwards(folder, 2**30) == ([3 + 1, 3, 3], 3, 4)


def test_a_repeating_block_costs_a_forward_a_group_and_one_more(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=3, tokenizer=False)
    assert forwards(folder, 0) == ([3 * 5 + 1, 3 * 5, 3 * 5], 3, 4)


def test_a_block_that_is_not_pruned_costs_one_forward_a_batch(tmp_path: Path) -> None:
    stream = stream_of(save_tiny("llama", tmp_path, tokenizer=False), random_tokens())
    for block in stream:
        with counted(block.module) as calls:
            block.advance()
        assert len(calls) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),
        ("opt", ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"]),
        ("cohere", ["q_proj k_proj v_proj gate_proj up_proj", "o_proj", "down_proj"]),
        ("falcon", ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"]),
        (
            "qwen2_moe",
            ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj", *["gate_up_proj", "down_proj"] * 4],
        ),
    ],
)
@every_mode
def test_layers_that_share_their_input_form_a_group_in_call_order(
    name: str, expected: list[str], memory: int, tmp_path: Path
) -> None:
    stream = stream_of(save_tiny(name, tmp_path, tokenizer=False), random_tokens(), memory)
    for block in stream:
        found = []
        for group in stream.groups(block):
            prune_group(group)
            found.append({ref.local.rpartition(".")[2] for ref in group.refs})
        assert found == [set(names.split()) for names in expected]


@every_mode
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "gemma3_text", "qwen2_moe"])
def test_a_group_sees_the_inputs_that_the_groups_before_it_produce(name: str, memory: int, tmp_path: Path) -> None:
    """An independent whole model gets the pruned weights group by group; its inputs are collected with plain hooks."""
    save_tiny(name, tmp_path, tokenizer=False)
    tokens = random_tokens()
    stream, plain = stream_of(tmp_path, tokens, memory), reload(tmp_path)
    for block in stream:
        for group in stream.groups(block):
            names = [ref.name for ref in group.refs]
            with recorded_inputs(plain, names) as found:
                whole_logits(plain, tokens)
            X = torch.cat([x.flatten(0, -2) for x in found[names[0]]]).double()
            stats = group.problem.stats
            assert stats.tokens == len(X)
            assert group.refs[0].expert or len(X) == tokens.numel()
            assert torch.allclose(
                stats.gram.double(), X.T @ X / len(X), rtol=1e-4, atol=1e-5 * float(X.square().mean())
            )
            assert torch.equal(stats.gram, stats.gram.T)
            assert all(torch.equal(torch.cat(found[n]), torch.cat(found[names[0]])) for n in names)
            prune_group(group)
            for ref in group.refs:
                name = parameter_of(plain, ref.name)
                plain.get_parameter(name).data.copy_(block.changed[name])


@pytest.mark.parametrize(("samples", "batch"), [(5, 2), (5, 4), (3, 5), (4, 2)])
def test_an_uneven_last_batch_counts_all_the_same(samples: int, batch: int, tmp_path: Path) -> None:
    save_tiny("gemma3_text", tmp_path, tokenizer=False)
    tokens = random_tokens(samples)
    skeleton = skeleton_of(tmp_path)
    assert torch.equal(streamed_logits(skeleton, tokens, batch), whole_logits(reload(tmp_path), tokens, batch))
    stream = stream_through(skeleton, tokens, batch_tokens=batch * LENGTH, chosen=chosen(skeleton))
    assert [len(b.tokens) for b in stream.inputs.batches] == [len(part) for part in tokens.split(batch)]
    for block in stream:
        for group in stream.groups(block):
            assert group.problem.stats.tokens == tokens.numel()
            prune_group(group)


@every_mode
@pytest.mark.parametrize("bad", ["up", "down"])
def test_an_overflow_names_its_layer(bad: str, memory: int, tmp_path: Path) -> None:
    """A huge bias in block 1: the inputs of `down` overflow, or the block's output does."""
    toy(tmp_path, "Plain")
    edit_tensor(tmp_path, f"layers.1.{bad}.weight", lambda t: t.abs_().mul_(1e38))
    edit_tensor(tmp_path, f"layers.1.{bad}.bias", lambda t: t.fill_(3e38))
    stream = stream_of(tmp_path, random_tokens(), memory)
    with pytest.raises(InputError) as caught:
        pruned(stream)
    assert ("layers.1.down" if bad == "up" else "layers.1") in caught.value.message
    assert caught.value.hint


@every_mode
def test_experts_that_no_token_reaches_are_pruned_by_magnitude_and_say_so(memory: int, tmp_path: Path) -> None:
    toy(tmp_path, "Experts")
    stored, solutions, _ = pruned(stream_of(tmp_path, random_tokens(), memory))
    assert len(solutions) == 2 * 3 * 2
    dense = stream_of(tmp_path, random_tokens()).skeleton.checkpoint
    for name, solution in solutions.items():
        unreached = ".experts.2." in name
        assert (solution.status == Status.NO_INPUT) == unreached
        weight, new = dense[f"{name}.weight"], stored[f"{name}.weight"]
        assert ((new.reshape(-1, 4) == 0).sum(1) == 2).all()
        assert torch.equal(new[new != 0], weight[new != 0]) == unreached


@every_mode
def test_an_expert_that_only_a_later_batch_reaches_is_solved_on_its_inputs(memory: int, tmp_path: Path) -> None:
    toy(tmp_path, "Experts")
    embedding = stream_of(tmp_path, random_tokens()).skeleton.checkpoint["embed.weight"][3:, 0]
    low, high = int(embedding.argmin()) + 3, int(embedding.argmax()) + 3
    tokens = torch.tensor([[low] * 8, [low] * 8, [high] * 8])
    stream = stream_of(tmp_path, tokens, memory)
    seen: dict[str, int] = {}
    for block in stream:
        for group in stream.groups(block):
            prune_group(group)
            seen |= {ref.name: group.problem.stats.tokens for ref in group.refs}
    expected = {"experts.0": 16, "experts.1": 8, "experts.2": 0}
    first = {name: tokens for name, tokens in seen.items() if name.startswith("layers.0.")}
    assert first == {f"layers.0.{e}.{layer}": n for e, n in expected.items() for layer in ("up", "down")}


class Grouped(nn.Linear):
    """Half of the rows see half of the inputs each, so its weight is `(out, in / 2)` of inputs twice as wide."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        a, b = x.chunk(2, -1)
        return torch.cat([a @ first.T, b @ second.T], -1) + self.bias


@toy_block
class Prism(nn.Module):
    """A mixture under names of its own: three lenses, chosen by a two-layer prism; and a module that never runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.prism = nn.ModuleDict({"facet": nn.Linear(width, 8), "edge": nn.Linear(8, 3)})
        self.lenses = nn.ModuleList(Plain(width) for _ in range(3))
        self.halves = Grouped(width, 2 * width)
        self.idle = nn.ModuleDict({"query": nn.Linear(width, width)})
        self.back = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        score = self.prism["edge"](self.prism["facet"](x).relu()).softmax(-1)
        value, choice = (score + 0.0).flatten(0, 1).topk(1)
        parts = torch.stack([lens(x).flatten(0, 1) for lens in self.lenses], 1)
        picked = parts.gather(1, choice[..., None].expand(-1, 1, x.shape[-1]))[:, 0] * value
        return x + picked.view(x.shape) + self.back(self.halves(torch.cat([x, x], -1)))


@every_mode
def test_layers_that_no_gram_of_their_inputs_describes_stay_dense_and_say_why(memory: int, tmp_path: Path) -> None:
    toy(tmp_path / "prism", "Prism")
    stream = stream_of(tmp_path / "prism", random_tokens(), memory)
    stored, _, _ = pruned(stream)
    reasons = {
        "prism.facet": "router", "prism.edge": "router", "halves": "another product than of weight and input",
        "idle.query": "never called",
    }  # fmt: skip
    assert stream.dense == {f"layers.{i}.{name}": why for i in range(2) for name, why in reasons.items()}
    lenses = {f"lenses.{n}.{part}" for n in range(3) for part in ("up", "down")}
    assert stored.keys() == {f"layers.{i}.{name}.weight" for i in range(2) for name in {"back", *lenses}}
    toy(tmp_path / "twice", "Twice")
    twice = stream_of(tmp_path / "twice", random_tokens(), memory)
    assert pruned(twice)[0].keys() == {"layers.0.two.weight", "layers.1.two.weight"}
    assert set(twice.dense.values()) == {"called more than once in a block"}


def test_a_choice_among_as_many_outputs_as_inputs_makes_no_router(tmp_path: Path) -> None:
    """Sparse activations: the largest of all features are kept."""
    stream = stream_of(toy(tmp_path, "Sparse"), random_tokens())
    assert len(pruned(stream)[0]) == 4
    assert not stream.dense


@toy_block
class Sparse(Pair):
    """Keeps the four largest features."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return x + self.two(y * (y >= y.topk(4).values[..., -1:]))


@every_mode
def test_layers_whose_order_depends_on_the_text_are_each_pruned_once(memory: int, tmp_path: Path) -> None:
    toy(tmp_path, "Fickle")
    tokens = random_tokens(8)
    plain = reload(tmp_path)
    with recorded_inputs(plain, ["layers.0"]) as found:
        whole_logits(plain, tokens)
    assert {float(x.sum()) > 0 for x in found["layers.0"]} == {True, False}
    stored, solutions, hidden = pruned(stream_of(tmp_path, tokens, memory))
    assert solutions.keys() == {f"layers.{i}.{n}" for i in range(2) for n in ("one", "two")}
    assert all(((w.reshape(-1, 4) == 0).sum(1) == 2).all() for w in stored.values())
    assert torch.isfinite(hidden).all()


def hooks_and_greenlets(module: nn.Module) -> tuple[int, int]:
    gc.collect()
    alive = [g for g in gc.get_objects() if type(g) is greenlet and not g.dead and g.gr_frame is not None]
    return sum(len(m._forward_pre_hooks) for m in module.modules()), len(alive)


@every_mode
def test_an_exception_inside_a_solve_leaves_nothing_behind(memory: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    stream = stream_of(tmp_path, random_tokens(), memory)
    module = stream.skeleton.model
    before = hooks_and_greenlets(module)

    def fail() -> None:
        for block in stream:
            for number, _ in enumerate(stream.groups(block)):
                if number == 1:
                    raise ZeroDivisionError

    try:
        fail()
    except ZeroDivisionError:
        pass
    assert hooks_and_greenlets(module) == before
    assert all(parameter.device.type == "meta" for parameter in module.parameters())
    again = pruned(stream_of(tmp_path, random_tokens(), memory))[2]
    assert torch.isfinite(again).all()


@every_mode
def test_an_exception_inside_a_forward_reaches_the_caller(memory: int, tmp_path: Path) -> None:
    stream = stream_of(toy(tmp_path, "Plain"), random_tokens(), memory)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    handle = stream.skeleton.blocks[1].down.register_forward_hook(broken)
    with pytest.raises(ZeroDivisionError):
        pruned(stream)
    handle.remove()
    assert hooks_and_greenlets(stream.skeleton.model)[0] == 0


def test_between_blocks_no_block_weights_are_in_memory(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=3, tokenizer=False)
    stream = stream_of(tmp_path, random_tokens())
    for index, block in enumerate(stream):
        real = {n for n, p in stream.skeleton.model.named_parameters() if p.device.type != "meta"}
        assert real == set(stream.skeleton.block_parameters(index))
        for group in stream.groups(block):
            prune_group(group)
    assert all(parameter.device.type == "meta" for parameter in stream.skeleton.model.parameters())


def test_the_same_run_twice_gives_the_same_bits(tmp_path: Path) -> None:
    save_tiny("qwen2_moe", tmp_path, tokenizer=False)
    (a, _, x), (b, _, y) = (pruned(stream_of(tmp_path, random_tokens())) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(x, y)


def test_a_model_that_does_not_chain_its_blocks_is_refused(tmp_path: Path) -> None:
    folder = toy(tmp_path, "Plain")
    skeleton = skeleton_of(folder)
    skeleton.model.forward = lambda input_ids, **_: skeleton.model.layers[1](skeleton.model.embed(input_ids))
    with pytest.raises(InputError, match="one after the other"):
        stream_through(skeleton, random_tokens())


@every_mode
def test_a_block_that_replaces_its_parameters_while_it_runs_is_refused(memory: int, tmp_path: Path) -> None:
    stream = stream_of(toy(tmp_path, "Swapped"), random_tokens(), memory)
    with pytest.raises(InputError, match=r"replaces its own parameter 'layers\.0\.two\.bias'"):
        pruned(stream)


@every_mode
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma4_text", "gpt2", "falcon", "opt"])
def test_a_twin_stream_pairs_every_input_with_that_of_the_dense_model(
    model_type: str, memory: int, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    tokens = random_tokens()
    dense, plain = reload(tmp_path), reload(tmp_path)
    stream = stream_of(tmp_path, tokens, memory, dense=True)
    names = sorted(stream.observe.chosen)
    with recorded_inputs(dense, names) as wanted:
        whole_logits(dense, tokens)
    seen: dict[str, InputStats] = {}
    for block in stream:
        for group in stream.groups(block):
            seen |= {ref.name: group.problem.stats for ref in group.refs}
            prune_group(group)
        for name, tensor in block.changed.items():
            plain.get_parameter(name).data.copy_(tensor)
    with recorded_inputs(plain, names) as found:
        whole_logits(plain, tokens)
    assert seen.keys() == set(names)
    moved = 0
    for name, stats in seen.items():
        X, X_d = (torch.cat(inputs[name]).double().flatten(0, -2) for inputs in (found, wanted))
        assert stats.tokens == len(X)
        products = {"gram": X.T @ X, "cross": X.T @ X_d, "dense": X_d.T @ X_d}
        if stats.output_cross is not None:
            Y = torch.nn.functional.linear(X_d, layer_weight(dense, name).detach().double())
            products = {"gram": X.T @ X, "output_cross": X.T @ Y}
        for field, expected in products.items():
            scale = float(expected.abs().mean()) / len(X)
            assert torch.allclose(getattr(stats, field).double(), expected / len(X), rtol=1e-4, atol=1e-3 * scale)
        moved += not torch.allclose(X, X_d, rtol=1e-3)
    assert moved > 3


def layer_weight(model: nn.Module, name: str) -> Tensor:
    """`(out, in)` for Linear and Conv1D alike."""
    layer = model.get_submodule(name)
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


@every_mode
def test_a_twin_that_nobody_prunes_stays_equal(memory: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    stream = stream_of(tmp_path, random_tokens(), memory, dense=True)
    for block in stream:
        if block.index:
            for _ in stream.groups(block):
                pass
    assert all(torch.equal(batch.hidden, batch.dense) for batch in stream.inputs.batches if batch.dense is not None)
    assert stream.inputs.batches[0].dense is not None


@every_mode
def test_tokens_that_are_routed_have_no_pair(memory: int, tmp_path: Path) -> None:
    stream = stream_of(toy(tmp_path, "Experts"), random_tokens(8), memory, dense=True)
    for block in stream:
        for group in stream.groups(block):
            assert group.problem.stats.cross is None
            prune_group(group)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "opt", "gpt_neox", "cohere", "phi"])
def test_what_leaves_a_twin_stream_is_what_the_pruned_model_computes(model_type: str, tmp_path: Path) -> None:
    """Where a layer ran before it was pruned, the residual stream is told of the change."""
    save_tiny(model_type, tmp_path, tokenizer=False)
    stream = stream_of(tmp_path, random_tokens(), dense=True)
    stored, _, hidden = pruned(stream)
    last = stream.skeleton.block_name(len(stream) - 1)
    plain = reload(tmp_path)
    for name, weight in stored.items():
        plain.get_parameter(name).data.copy_(weight)
    seen: list[Tensor] = []
    plain.get_submodule(last).register_forward_hook(
        lambda _, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    whole_logits(plain, random_tokens())
    assert torch.allclose(torch.cat(seen), hidden, rtol=1e-4, atol=1e-5)
