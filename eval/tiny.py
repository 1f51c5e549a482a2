"""Tiny random models of every type that transformers registers, and what plain transformers computes with them.

A config is made from its class's own defaults: sizes are replaced by small ones, by what their names say; of settings
with one entry for every block as many blocks are kept as show every kind. What a type needs beside that stands in
tables.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from llmprune.model.auto_class import auto_class, text_section
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.skeleton import Skeleton
from llmprune.sources.tokens import save_tokens, token_batch
from llmprune.streaming.capture import logits
from llmprune.streaming.stream import BlockStream, Observe, Resources

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
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "moe_intermediate_size": 32,
        "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 64, "mtp_layers_block_type": [],
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8,
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
        **{
            f"{part}_config": {**_BYTES, "vocab_size": 96, **({} if part == "patcher" else {"hidden_size_global": 64})}
            for part in ("encoder", "decoder", "patcher")
        },
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


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


_VOCABULARY = {"vocabulary_map": {"<image>": VOCAB - 1}}
_PIXELS = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "chameleon": {**_VOCABULARY, "vq_config": _PIXELS},
    "codegen": {"rotary_dim": 8, "n_embd": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _mrope(2, 3, 3)["rope_parameters"]}},
    "cosmos3_edge_text": _mrope(2, 3, 3),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"], "per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 16},
    "emu3": {**_VOCABULARY, "vq_config": _PIXELS},
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe_text": {**_mrope(3, 3, 2), "moe_k": 2},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128},
    "gemma4_assistant": {
        "text_config": {
            "num_hidden_layers": 2, "layer_types": _WINDOWS, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "qk_nope_head_dim": 16},
    "glm4v_moe_text": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "glm_ocr_text": _mrope(2, 3, 3),
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1],
        "vision_config": {"hidden_size": 64}, "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
    },
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_head": 32, "num_local_experts": 4, "layer_types": ["mamba", "attention"],
    },
    "hunyuan_vl_text": _mrope(2, 2, 2, 2),
    "janus": {"vq_config": _PIXELS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "mistral4": {"head_dim": 16},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mllama": {"vision_config": {"max_num_tiles": 4, "intermediate_layers_indices": [0]}},
    "molmo2": {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [0, 0]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4}},
    "paddleocr_vl_text": _mrope(2, 3, 3),
    "qwen2_5_omni_text": _mrope(2, 3, 3),
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 8},
    "xlstm": {"num_heads": 4, "chunk_size": 8, "qk_dim_factor": 1.0, "max_inference_chunksize": 64},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What a type needs that is made from its defaults; of a wrapper, also its parts."""
OPENING: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
}  # fmt: skip
"""What a config cannot be made without."""
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


SMALL = [
    (r"(^|_)(num|n)_(\w+_)?layers$|^(\w+_)?layers$|^depth$|^num_blocks$|_depth$", 2),
    (r"(moe|expert|experts)_(\w+_)?(intermediate|hidden|ffn\w*)_(size|dim)$|^share_expert_dim$", 32),
    (r"(key_value|kv)_heads$|num_query_groups$", 2),
    (r"heads?(_per_ngram)?$", 4),
    (r"(^|_)shared_experts$|^first_k_dense_replace$|^num_dense_layers$|^n_?groups?$|^topk_group$|_expert_group$", 1),
    (r"(^|_)experts$", 4),
    (r"(experts_per_tok(en)?|moe_top_?k)$", 2),
    (r"index_kpool$", 4),
    (r"index_topk(_blocks)?$|top_k$|window(_size|_len|_left)?$|chunk(_size|_length)?$|chunksize$", 8),
    (r"index_block_size$|(^|_)block_size$|local_attention$", 8),
    (r"rank$|_lowrank$|^rel_extent$", 16),
    (r"vocab(_size)?(_per_layer_input)?$|^num_embeddings$|^ngram_vocab_size_base$", VOCAB),
    (r"codebook_size$", 64),
    (r"state(_size)?$|time_step_rank$|_dt_rank$", 8),
    (r"head_?dim$|^d_head$|^dim_head$|^d_kv$|^mamba_d_head$|^kv_channels$|head_size$|rope_dim$", 16),
    (r"intermediate|ffn|(^|_)d?ff$|dim_ff|feed_forward|^d_inner$|mlp_size|^d_ff$", 128),
    (r"hidden_(size|dim)|d_model|n_embd|embed_dim|emb_dim|embedding_(size|dim)|width$|_output_dim$", 64),
    (r"(^|_)(position(s|_embeddings)|seq_len|n_ctx|context_length)$", 64),
]  # fmt: skip
"""Small sizes of what a setting's name says it counts; the first that matches holds."""


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """A config of few small blocks, so many as show every kind; of a wrapper, with small towers beside them."""
    known = AutoConfig.for_model(model_type, **OPENING.get(model_type, {}))
    if not (section := _section(known)):
        settings = _settings(known)
        return AutoConfig.for_model(model_type, **_merged(_for_blocks(settings, options), options))
    text = tiny_config(known.get_text_config().model_type).to_dict() | options
    settings = {key: value for key, value in _small(known.to_dict()).items() if key not in known.sub_configs}
    settings |= {key: VOCAB - 1 for key in known.to_dict() if re.search(r"token_(id|index)$", key)}
    for name, kind in known.sub_configs.items():
        if name != section and (part := getattr(known, name, None) or (kind() if name == "vision_config" else None)):
            settings[name] = _tower(part)
    return AutoConfig.for_model(model_type, **_merged({**settings, section: text}, FIXES.get(model_type, {})))


def _for_blocks(settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The settings with entries for as many blocks as are asked for, the last kind repeated where there are more."""
    have, wanted = settings.get("num_hidden_layers"), options.get("num_hidden_layers")
    if not have or not wanted or have == wanted:
        return settings
    lists = {key: value for key, value in settings.items() if isinstance(value, list) and len(value) == have}
    return settings | {key: (value + value[-1:] * wanted)[:wanted] for key, value in lists.items()}


def _section(config: PreTrainedConfig) -> str:
    """As `text_section`; '' where a config holds several language models."""
    try:
        return text_section(config)
    except ValueError:
        return ""


def _tower(known: PreTrainedConfig) -> dict[str, Any]:
    """The small settings of what lies beside a language model."""
    settings = known.to_dict()
    inner = {name: _tower(part) for name in known.sub_configs if (part := getattr(known, name, None)) is not None}
    given = {k: v for k, v in _known(known, VISION).items() if isinstance(settings.get(k), list) == isinstance(v, list)}
    return {**_small(settings), **given, **inner, "model_type": known.model_type}


def _settings(known: PreTrainedConfig) -> dict[str, Any]:
    """The small settings of a config that is no wrapper."""
    if (given := EXTRA.get(known.model_type)) is not None:
        return {**_known(known, COMMON), **given}
    small = _small(known.to_dict())
    found = {**_known(known, COMMON), **small, **_few_blocks(known, small)}
    if hasattr(known, "is_decoder"):
        found["is_decoder"] = True
    for name in known.sub_configs:
        if (part := getattr(known, name, None)) is not None:
            found[name] = _tower(part)
    return _merged(found, FIXES.get(known.model_type, {}))


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with changes, of which those of a part of the config are merged into it."""
    inner = {
        key: _merged(settings[key], value)
        for key, value in changes.items()
        if key.endswith("_config") and isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return {**settings, **changes, **inner}


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    """Small values of those settings that count something; the widths of latent attention hang together."""
    latent = _LATENT if "kv_lora_rank" in settings else {}
    found = {key: value for key, value in {**COMMON, **latent}.items() if key in settings}
    for key, value in settings.items():
        if key not in found and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            size = next((size for pattern, size in SMALL if re.search(pattern, key)), value)
            found[key] = min(value, size)
    return found


def _few_blocks(known: PreTrainedConfig, small: dict[str, Any]) -> dict[str, Any]:
    """Of settings with an entry for every block the entries of a few: the first of every kind, two at least."""
    settings, count = known.to_dict(), getattr(known, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == count and not key.startswith("_")
    }
    numbered = {key for key, value in lists.items() if value == list(range(count))}
    kinds: set[tuple[str, str]] = set()
    kept = []
    for at in range(count if lists else 0):
        new = {(key, str(value[at])) for key, value in lists.items() if key not in numbered} - kinds
        if new or len(kept) < 2:
            kept.append(at)
            kinds |= new
    if not kept:
        return {}
    cut = {key: list(range(len(kept))) if key in numbered else [v[at] for at in kept] for key, v in lists.items()}
    own = {int(at): values for at, values in settings.get("per_layer_config", {}).items()}
    if own:
        cut["per_layer_config"] = {
            f"{new:02}": {key: small.get(key, value) for key, value in own[old].items()}
            for new, old in enumerate(kept)
            if old in own
        }
    return {"num_hidden_layers": len(kept), **cut}


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
    return shaken(auto_model(config).from_config(config, dtype=torch.float32, trust_remote_code=False).eval())


@torch.no_grad()
def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; norms and biases, and matrices that begin as zeros, are random too."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names on disk."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def random_tokens(samples: int = 5, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))


def token_file(path: Path, tokens: Tensor | None = None) -> Path:
    """A frozen calibration file."""
    save_tokens(token_batch(random_tokens() if tokens is None else tokens, "random ids", 0), path)
    return path


def skeleton_of(folder: Path, **options: Any) -> Skeleton:
    return Skeleton(AutoConfig.from_pretrained(folder, trust_remote_code=False), SafetensorsFolder(folder), **options)


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What plain transformers makes of a folder; experts run one by one, as the stream has them run."""
    model = (
        auto_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        .from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        .eval()
    )
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
