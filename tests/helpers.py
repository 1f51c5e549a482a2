"""Tiny random models of any type, saved as real checkpoints are, and plain references to compare with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from llmprune.job import Job
from llmprune.model.auto_class import auto_class, text_section
from llmprune.model.blocks import find_layers
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.skeleton import Skeleton
from llmprune.sources.tokens import save_tokens, token_batch
from llmprune.streaming.capture import logits
from llmprune.streaming.stream import BlockStream, Observe, Resources

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, LENGTH, BATCH = 96, 24, 2
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Given to a config where it knows the name."""
_WINDOWS = ["sliding_attention", "full_attention"]
_MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16,
}  # fmt: skip
_INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_BYTES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
EXTRA: dict[str, dict[str, Any]] = {
    "biogpt": {"hidden_dropout_prob": 0.0},
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "q_lora_rank": 16, "kv_lora_rank": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
    "falcon": {"num_attention_heads": 4},
    "gemma3_text": {"sliding_window": 8, "layer_types": _WINDOWS},
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _WINDOWS * 2, "sliding_window": 8,
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "global_head_dim": 16,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _WINDOWS, "sliding_window": 8},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "granitemoe": {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128, "moe_layers": [0, 1]},
    "mamba": {"use_mambapy": False, "time_step_rank": 8, "state_size": 8},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron_h": {
        "layers_block_type": ["moe", "full_attention"], "moe_intermediate_size": 32, "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 64, "mtp_layers_block_type": [],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _MOE,
    "xglm": {"d_model": 64, "num_layers": 2, "ffn_dim": 128, "attention_heads": 4},
    "axk2": {
        **_LATENT, **_INDEXER, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_group": 1, "topk_group": 1, "gated_norm_rank": 8,
    },
    "bart": {
        "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "encoder_layers": 2,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "is_decoder": True, "is_encoder_decoder": False,
    },
    "blt": {
        **{f"{part}_config": {**_BYTES, "vocab_size": 96} for part in ("encoder", "decoder", "patcher")},
        "global_config": {**_BYTES, "hidden_size": 64, "num_hidden_layers": 2},
        "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3],
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        **_INDEXER, "num_key_value_heads": 1, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 8, "hc_mult": 2,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"], "partial_rotary_factor": 0.5,
    },
    "falcon_mamba": {"use_mambapy": False, "time_step_rank": 8, "state_size": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _WINDOWS * 2, "sliding_window": 8,
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "hrm_text": {"num_hidden_layers": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v4": {
        **_LATENT, **_INDEXER, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "shared"],
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 4, "num_local_experts": 4},
    "longcat_flash": {
        **_LATENT, "num_layers": 2, "ffn_hidden_size": 64, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32, "qk_head_dim": 16,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_embds": False, "feed_forward_size": 128,
        "attention_head_size": 16, "is_decoder": True, "local_attn_chunk_length": 8,
    },
    "rwkv": {"attention_hidden_size": 64},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "mem_len": None},
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4, "use_mamba_kernels": False, "mamba_dt_rank": 8, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 4, "use_mamba_kernels": False, "mamba_d_state": 16, "chunk_size": 8, "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "zaya": {**_MOE, "num_experts_per_tok": 1, "router_hidden_size": 32, "num_hidden_layers": 3},
    **dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text", "glm4v_text"), _MROPE),
}  # fmt: skip
"""What a model type needs beside that."""
VISION: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "max_num_tiles"), 1), "num_attention_heads": 2, "num_heads": 2,
    "num_key_value_heads": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "head_dim": 16,
    "global_head_dim": 16, "image_size": 16, "patch_size": 4, "num_position_embeddings": 16,
    **dict.fromkeys(
        ("out_hidden_size", "vision_output_dim", "projection_dim", "projector_input_dim", "projector_output_dim"), 64
    ),
    "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0],
}  # fmt: skip
"""Given to the vision part of a wrapper where it knows the name."""


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """A config of two small blocks; of a wrapper, with a vision tower of one."""
    known = AutoConfig.for_model(model_type)
    if not (section := text_section(known)):
        return AutoConfig.for_model(model_type, **{**_known(known, COMMON), **EXTRA.get(model_type, {}), **options})
    text = tiny_config(known.get_text_config().model_type).to_dict() | options
    vision = known.vision_config or known.sub_configs["vision_config"]()
    tower = {**_known(vision, VISION), "model_type": vision.model_type}
    special = {key: VOCAB - 1 for key in known.to_dict() if re.search(r"token_(id|index)$", key)}
    return AutoConfig.for_model(model_type, **{**special, section: text, "vision_config": tower})


def _known(config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    names = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    return {name: value for name, value in settings.items() if name in names}


def auto_model(config: PreTrainedConfig) -> Any:
    """The automatic class for a config."""
    return getattr(transformers, auto_class(config))


def tiny_model(model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random float32 model; vectors (norms, biases) are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **options)
    return shaken(auto_model(config).from_config(config, dtype=torch.float32).eval())


@torch.no_grad()
def shaken(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


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


def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names on disk."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


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


def random_tokens(samples: int = 5, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))


def token_file(path: Path, tokens: Tensor | None = None) -> Path:
    """A frozen calibration file."""
    save_tokens(token_batch(random_tokens() if tokens is None else tokens, "random ids", 0), path)
    return path


def text_file(path: Path, words: int = 400, seed: int = 1) -> Path:
    """A text of the tiny tokenizer's words."""
    ids = random_tokens(1, words, seed)[0].tolist()
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path


def job(model: Path, out: Path, calib: Path, sparsity: str = "2:4", **options: Any) -> Job:
    """A job that measures no perplexity unless told to."""
    return Job(str(model), sparsity, **{"calib": str(calib), "out": out, "device": "cpu", "evaluate": False, **options})


def skeleton_of(folder: Path, **options: Any) -> Skeleton:
    return Skeleton(AutoConfig.from_pretrained(folder), SafetensorsFolder(folder), **options)


def chosen(skeleton: Skeleton) -> frozenset[str]:
    """All layers but the routers."""
    return frozenset(
        layer.name
        for index, block in enumerate(skeleton.blocks)
        for layer in find_layers(block, skeleton.block_name(index), skeleton.config)
        if not layer.skip
    )


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What plain transformers makes of a folder; experts run one by one, as the stream has them run."""
    model = auto_model(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    for parameter in model.parameters():  # a product's last bits depend on where a tensor lies in its file
        parameter.data = parameter.data.clone()
    return model


TRANSPOSED = {
    "gpt_oss": {"gate_up_proj", "down_proj"},
    "llama4_text": {"gate_up_proj", "down_proj"},
    "dbrx": {"w2"},
}
"""Parameters that hold the matrices of experts as `(in, out)`, by model type."""


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


def stream_through(skeleton: Skeleton, tokens: Tensor, **options: Any) -> BlockStream:
    """A stream with fields of `Observe` and `Resources` as options."""
    kinds = (Observe, Resources)
    observe, resources = ({f.name: options.pop(f.name) for f in fields(kind) if f.name in options} for kind in kinds)
    assert not options
    return BlockStream(skeleton, tokens, Observe(**observe), Resources(**resources))


def streamed_logits(skeleton: Skeleton, tokens: Tensor, batch: int = BATCH) -> Tensor:
    """Logits with one block in memory at a time."""
    stream = stream_through(skeleton, tokens, batch_tokens=batch * tokens.shape[1])
    for _ in stream:
        pass
    with skeleton.loaded(skeleton.outside()):
        return torch.cat([logits(skeleton, b.tokens, b.hidden, stream.inputs.wrap) for b in stream.inputs.batches])


@torch.no_grad()
def whole_logits(model: nn.Module, tokens: Tensor, batch: int = BATCH) -> Tensor:
    """Logits of the whole model."""
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in tokens.split(batch)])


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
