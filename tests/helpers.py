"""Tiny random models of any type, saved as real checkpoints are, and plain references to compare with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from eval.tiny import (  # noqa: F401 - the tests import from here what tiny models need
    BATCH,
    COMMON,
    EXTRA,
    LENGTH,
    TRANSPOSED,
    VISION,
    VOCAB,
    auto_model,
    on_disk,
    random_tokens,
    reload,
    shaken,
    skeleton_of,
    stream_through,
    streamed_logits,
    tiny_config,
    tiny_model,
    token_file,
    whole_logits,
)
from llmprune.job import Job
from llmprune.model.blocks import find_layers
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.state import RunState
from llmprune.reporting.report import PruneReport
from llmprune.streaming.stream import BlockStream

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def word_tokenizer(words: int, begin: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word: `w7` is token 7, everything else token 0.

    Args:
        words: number of tokens.
        begin: tokens that it puts before a text, the last as its BOS.
    """
    vocabulary = {"<unk>": 0} | {f"w{number}": number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>"}
    if begin:
        known = [(token, vocabulary[token]) for token in begin]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{' '.join(begin)} $A", special_tokens=known)
        special["bos_token"] = begin[-1]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny(
    model_type: str,
    folder: Path,
    *,
    base: bool = False,
    head: str = "",
    shard: str = "1GB",
    dtype: torch.dtype = torch.float32,
    rename: dict[str, str] | None = None,
    tokenizer: bool = True,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Save a tiny model.

    Args:
        model_type: of transformers, or registered by a test.
        folder: where to.
        base: only the base model, without the prefix in the names.
        head: `"stored"` or `"absent"`: whether a tied head stands in the file.
        shard: largest shard.
        dtype: of the weights.
        rename: parts of names on disk that are replaced.
        tokenizer: whether one is put beside it.
        seed: of the weights.
        options: of the config.
    """
    model = tiny_model(model_type, seed, **options)
    if dtype != torch.float32:  # complex buffers must stay
        model = model.to(dtype)
    model.config.dtype = dtype
    (model.base_model if base else model).save_pretrained(folder, max_shard_size=shard)
    if base:
        model.config.save_pretrained(folder)
    if head:
        out, inner = model.get_output_embeddings(), model.get_input_embeddings()
        name = next(n for n, module in model.named_modules() if module is out) + ".weight"
        rewrite(folder, lambda tensors: _with_head(tensors, name, inner.weight.data.clone(), head == "stored"))
    for old, new in (rename or {}).items():
        rewrite(folder, lambda tensors, old=old, new=new: {k.replace(old, new): v for k, v in tensors.items()})
    if tokenizer:
        word_tokenizer(model.config.get_text_config().vocab_size).save_pretrained(folder)
    return folder


def _with_head(tensors: dict[str, Tensor], name: str, weight: Tensor, stored: bool) -> dict[str, Tensor]:
    rest = {key: value for key, value in tensors.items() if key != name}
    return {**rest, name: weight} if stored else rest


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], shards: int = 1) -> None:
    """Edit the tensors of a folder, and spread them over so many shards."""
    tensors = edit(on_disk(folder))
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@contextmanager
def stopped_behind_the_first_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, a run is interrupted when its first block is durable."""
    commit = RunState.commit

    def stop(self: RunState, stream: BlockStream, report: PruneReport) -> None:
        commit(self, stream, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    """Change one tensor on disk, in its own file and in place."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})


def with_header(header: object, data: bytes) -> bytes:
    """A safetensors file: the header's length, the header, the tensors' bytes."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def without_header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the tensors' bytes."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def with_entry(raw: bytes, name: str, key: str, value: object) -> bytes:
    """A safetensors file whose header says something else of one tensor."""
    header, data = without_header(raw)
    header[name][key] = value
    return with_header(header, data)


def text_file(path: Path, words: int = 400, seed: int = 1) -> Path:
    """A text of the tiny tokenizer's words."""
    ids = random_tokens(1, words, seed)[0].tolist()
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path


def job(model: Path, out: Path, calib: Path, sparsity: str = "2:4", **options: Any) -> Job:
    """A job that measures no perplexity unless told to."""
    return Job(str(model), sparsity, **{"calib": str(calib), "out": out, "device": "cpu", "evaluate": False, **options})


def chosen(skeleton: Skeleton) -> frozenset[str]:
    """All layers but the routers."""
    return frozenset(
        layer.name
        for index, block in enumerate(skeleton.blocks)
        for layer in find_layers(block, skeleton.block_name(index), skeleton.config)
        if not layer.skip
    )


def parameter_of(model: nn.Module, layer: str) -> str:
    """The parameter that holds a layer's weight; those of all experts are one."""
    parameters = dict(model.named_parameters())
    if f"{layer}.weight" in parameters:
        return f"{layer}.weight"
    owner, _, attribute = re.sub(r"\.\d+\.(\w+)$", r" \1", layer).partition(" ")
    assert f"{owner}.{attribute}" in parameters
    return f"{owner}.{attribute}"


def weight_of(model: PreTrainedModel, layer: str) -> Tensor:
    """A layer's weight, `(out, in)`, whatever its class stores; of an expert, its slice."""
    name = parameter_of(model, layer)
    parameter = model.get_parameter(name).data
    if name == f"{layer}.weight" and parameter.dim() == 2:
        return parameter.T if isinstance(model.get_submodule(layer), Conv1D) else parameter
    attribute, index = name.rpartition(".")[2], int(layer.split(".")[-2])
    if parameter.dim() == 2:
        experts = model.config.ffn_config.moe_num_experts
        parameter = parameter.view(experts, -1, parameter.shape[1])
    matrix = parameter[index]
    return matrix.T if attribute in TRANSPOSED.get(model.config.get_text_config().model_type, ()) else matrix


def block_prefix(layers: list[str]) -> str:
    """The blocks' common name, from names of layers: `model.layers.`"""
    found = {re.split(r"\d+\.", name, maxsplit=1)[0] for name in layers}
    assert len(found) == 1
    return found.pop()


class ToyConfig(PreTrainedConfig):
    """A chain of blocks of a kind that a test invents."""

    model_type = "toy"

    def __init__(self, kind: str = "plain", hidden_size: int = 16, vocab_size: int = VOCAB, **kwargs: Any) -> None:
        self.kind, self.hidden_size, self.vocab_size = kind, hidden_size, vocab_size
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


TOY_BLOCKS: dict[str, type[nn.Module]] = {}


def toy_block(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a block class, called with its width, the block of the toy model of that kind."""
    TOY_BLOCKS[cls.__name__] = cls
    return cls


@toy_block
class Plain(nn.Module):
    """Feed-forward only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Toy(PreTrainedModel):
    """Embedding, two blocks, head."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TOY_BLOCKS[config.kind](config.hidden_size) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))


class ToySharedConfig(ToyConfig):
    """The same, with a weight that two blocks share."""

    model_type = "toy-shared"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


class ToyShared(Toy):
    """Both blocks have the same `up.weight`."""

    config_class = ToySharedConfig
    _tied_weights_keys = {"layers.1.up.weight": "layers.0.up.weight"}  # noqa: RUF012


AutoConfig.register("toy", ToyConfig)
AutoConfig.register("toy-shared", ToySharedConfig)
AutoModelForCausalLM.register(ToySharedConfig, ToyShared)
AutoModelForCausalLM.register(ToyConfig, Toy)


@contextmanager
def recorded_inputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of the named modules, with plain hooks; of experts, from their tokens and weights."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def expert(owner: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden, index, _ = inputs
            *_, number, attribute = name.split(".")
            rows = hidden[(index == int(number)).any(1)]
            if attribute == "down_proj":
                rows = owner._apply_gate(rows @ owner.gate_up_proj[int(number)].T)
            found[name].append(rows)

        return expert if name not in modules else lambda _, inputs: found[name].append(inputs[0])

    places = {name: name if name in modules else ".".join(name.split(".")[:-2]) for name in names}
    handles = [modules[place].register_forward_pre_hook(hook(name)) for name, place in places.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
