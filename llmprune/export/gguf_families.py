"""Which models llmprune can say in GGUF: llama.cpp's architecture for a type, its settings, and what weights change.

llama.cpp's code of an architecture takes some things for granted that a config of transformers can say otherwise. Each
is checked here, and the model is refused where they disagree: a file that loads and computes something else is worse
than none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Settings = dict[str, Any]
"""Keys of a GGUF header without the name of the architecture, and their values."""
OTHER_WAY = "llama.cpp's own convert_hf_to_gguf.py may know it; the folder is a plain one"
_PERIOD_GEMMA2, _PERIOD_GEMMA3, _PERIOD_SMOLLM3 = 2, 6, 4
_LAYERS_27B = {46: "gemma2", 62: "gemma3"}
"""Numbers of blocks by which llama.cpp knows the two models of 27 B, whose attention it scales in another way."""


@dataclass(frozen=True, slots=True)
class Family:
    """A type of model as llama.cpp knows it.

    Args:
        architecture: its name there.
        interleaved: whether rotary positions turn neighbouring rows of a head (2i and 2i + 1), where transformers turns
            rows i and i + d/2; rows of q and k then change places.
        shifted: whether norms multiply by 1 + w in transformers, and by w in llama.cpp.
        activation: of the MLPs.
        windows: whether it has blocks with sliding windows.
        square: whether the heads together must be as wide as the model.
        head: whether the head must be there where it is the embeddings.
        scalings: of rotary positions that were tested, beside none.
        granted: settings of a config, and the values that llama.cpp takes for granted.
        more: its own settings.
    """

    architecture: str
    interleaved: bool = False
    shifted: bool = False
    activation: str = "silu"
    windows: bool = False
    square: bool = False
    head: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    granted: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[PreTrainedConfig], Settings] = lambda _: {}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        InputError: its type is not known, or it says something that llama.cpp does not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"model type {config.model_type!r} is none of those exported to GGUF: {', '.join(sorted(FAMILIES))}",
            OTHER_WAY,
        )
    if config.model_type == "qwen2" and not _is_square(config):
        family = _LLAMA  # the same computation, once its rows are interleaved
    if family.square and not _is_square(config):
        raise InputError(
            f"{config.num_attention_heads} heads of {head_width(config)} are not as wide as the model "
            f"({config.hidden_size}), as llama.cpp's {family.architecture} needs",
            "prune channels or weights of this model, not heads",
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    said = {"hidden_act": activation} | {key: getattr(config, key, None) for key in family.granted}
    for key, granted in {"hidden_act": family.activation, **family.granted}.items():
        if said[key] != granted:
            raise _differs(config, key, said[key], granted)
    return family


def _is_square(config: PreTrainedConfig) -> bool:
    return bool(config.num_attention_heads * head_width(config) == config.hidden_size)


def _differs(config: PreTrainedConfig, key: str, said: Any, granted: Any) -> InputError:
    return InputError(
        f"the config says {key} {said!r}, but llama.cpp computes {config.model_type} with {granted!r}",
        "this model cannot be said in GGUF; transformers runs it",
    )


def settings_of(config: PreTrainedConfig, family: Family, rows: int) -> Settings:
    """The settings of a model for the header, without the name of the architecture.

    Args:
        config: of the model.
        family: of the config.
        rows: of the embedding matrix.

    Raises:
        InputError: it says something that llama.cpp does not compute.
    """
    heads = config.num_attention_heads
    width = head_width(config)
    found: Settings = {
        "block_count": config.num_hidden_layers,
        "context_length": _context(config, family),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": rows,
    }
    return found | _rope(config, family) | family.more(config)


def head_width(config: PreTrainedConfig) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: PreTrainedConfig, family: Family) -> int:
    """The longest text of which both compute the same: where llama.cpp has no windows, no longer than those."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    longest = int(config.max_position_embeddings)
    if family.windows or window is None or (kinds is not None and "sliding_attention" not in kinds):
        return longest
    return min(longest, int(window))


def rope_parameters(config: PreTrainedConfig, kind: str = "full_attention") -> dict[str, Any]:
    """The settings of the rotary positions, of the blocks of a kind where they differ."""
    said: dict[str, Any] = config.rope_parameters
    return dict(said.get(kind, said))


def _rope(config: PreTrainedConfig, family: Family) -> Settings:
    said = rope_parameters(config)
    kind = said.get("rope_type", "default")
    if kind not in ("default", *family.scalings):
        raise InputError(
            f"rotary positions are scaled by {kind!r}, and {config.model_type} is exported with "
            f"{', '.join(('default', *family.scalings))}",
            OTHER_WAY,
        )
    turned = int(head_width(config) * said.get("partial_rotary_factor", 1.0))
    if family.interleaved and turned != head_width(config):
        raise _differs(config, "partial_rotary_factor", said["partial_rotary_factor"], 1.0)
    found: Settings = {"rope.dimension_count": turned, "rope.freq_base": float(said["rope_theta"])}
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(said["factor"])}
    if kind == "yarn":
        found |= _yarn(config, said)
    return found


def _yarn(config: PreTrainedConfig, said: Mapping[str, Any]) -> Settings:
    """YaRN's own settings; transformers and llama.cpp scale the attention alike unless a config says more."""
    usual = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
    for key, value in usual.items():
        if said.get(key, value) != value:
            raise _differs(config, key, said[key], value)
    found: Settings = {"rope.scaling.original_context_length": int(said["original_max_position_embeddings"])}
    for key in ("beta_fast", "beta_slow"):
        if said.get(key) is not None:
            found[f"rope.scaling.yarn_{key}"] = float(said[key])
    return found


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """What the periods of the rotary positions are multiplied by, of Llama 3's scaling; None where there is no such.

    Long periods by `factor`, short ones by 1, those between smoothly (transformers' `_compute_llama3_parameters`).
    """
    said = rope_parameters(config)
    if said.get("rope_type") != "llama3":
        return None
    width = head_width(config)
    periods = 2 * math.pi * said["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    smooth: Tensor = ((said["original_max_position_embeddings"] / periods - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = (1 - smooth) / said["factor"] + smooth
    return slowed.reciprocal().float()


def interleave(weight: Tensor, width: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: of every head row i and row i + width/2 become neighbours.

    Args:
        weight: `(heads · width, in)` or `(heads · width,)`.
        width: of a head.
    """
    halves = weight.reshape(weight.shape[0] // width, 2, width // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _experts(config: PreTrainedConfig) -> Settings:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return {"expert_count": int(count), "expert_used_count": int(config.num_experts_per_tok)}


def _qwen3_moe(config: PreTrainedConfig) -> Settings:
    return _experts(config) | {"expert_feed_forward_length": int(config.moe_intermediate_size)}


def _olmoe(config: PreTrainedConfig) -> Settings:
    if config.num_key_value_heads != config.num_attention_heads:
        raise _differs(config, "num_key_value_heads", config.num_key_value_heads, config.num_attention_heads)
    return _experts(config)


def _granite(config: PreTrainedConfig) -> Settings:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _smollm3(config: PreTrainedConfig) -> Settings:
    turned = [int((block + 1) % _PERIOD_SMOLLM3 != 0) for block in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != turned:
        raise _differs(config, "no_rope_layers", list(config.no_rope_layers), turned)
    return {}


def _windows(config: PreTrainedConfig, period: int) -> Settings:
    """Sliding windows in all blocks but every `period`-th."""
    kinds = [
        "full_attention" if (block + 1) % period == 0 else "sliding_attention"
        for block in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        raise _differs(config, "layer_types", list(config.layer_types), kinds)
    return {"attention.sliding_window": int(config.sliding_window)}


def _check_scale(config: PreTrainedConfig) -> None:
    wide = _LAYERS_27B.get(config.num_hidden_layers, "-") in config.model_type
    granted = config.hidden_size // config.num_attention_heads if wide else head_width(config)
    if config.query_pre_attn_scalar != granted:
        raise _differs(config, "query_pre_attn_scalar", config.query_pre_attn_scalar, granted)


def _gemma2(config: PreTrainedConfig) -> Settings:
    _check_scale(config)
    found = _windows(config, _PERIOD_GEMMA2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key) is None:
            raise _differs(config, key, None, "a number")
        found[key] = float(getattr(config, key))
    return found


def _gemma3(config: PreTrainedConfig) -> Settings:
    _check_scale(config)
    local = rope_parameters(config, "sliding_attention")
    if local.get("rope_type", "default") != "default":
        raise _differs(config, "rope_type of the windows", local["rope_type"], "default")
    found = _windows(config, _PERIOD_GEMMA3) | {"rope.freq_base_swa": float(local["rope_theta"])}
    if config.final_logit_softcapping is not None:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


_TANH = "gelu_pytorch_tanh"
_NO_BIAS = {"attention_bias": False}
_QWEN_EXPERTS = {**_NO_BIAS, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
_LLAMA = Family("llama", interleaved=True, scalings=("linear", "yarn", "llama3"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family("llama", interleaved=True, more=_experts),
    "smollm3": Family("smollm3", interleaved=True, granted={**_NO_BIAS, "mlp_bias": False}, more=_smollm3),
    "granite": Family("granite", interleaved=True, more=_granite),
    "qwen2": Family("qwen2", square=True),
    "qwen3": Family("qwen3", granted=_NO_BIAS),
    "qwen3_moe": Family("qwen3moe", granted=_QWEN_EXPERTS, more=_qwen3_moe),
    "olmo2": Family("olmo2", square=True, head=True, granted=_NO_BIAS),
    "olmoe": Family(
        "olmoe", square=True, head=True, granted={**_NO_BIAS, "norm_topk_prob": False, "clip_qkv": None}, more=_olmoe
    ),
    "phi3": Family("phi3", square=True, scalings=()),
    "gemma": Family("gemma", shifted=True, activation=_TANH, scalings=(), granted=_NO_BIAS),
    "gemma2": Family(
        "gemma2", shifted=True, activation=_TANH, windows=True, scalings=(), granted=_NO_BIAS, more=_gemma2
    ),
    "gemma3_text": Family(
        "gemma3", shifted=True, activation=_TANH, windows=True, scalings=("linear",),
        granted={**_NO_BIAS, "attn_logit_softcapping": None}, more=_gemma3,
    ),
}  # fmt: skip
"""Every type was compared with transformers, log-probabilities and greedy tokens, on a small random model
(`tests/export/test_gguf.py`)."""
