"""How a model's config says that its weights are stored: which forms in fewer bits are read, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.errors import InputError

KEYS = ("quantization_config", "compression_config")
"""Where a config says it, at its top or in the part of the language model."""
Block = tuple[int, int]
"""Rows and columns of the part of a matrix that shares a scale; 0 for all of them."""
TENSOR, CHANNEL = (0, 0), (1, 0)
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
"""Formats of compressed-tensors that keep an element a byte, and a scale beside them."""
INTEGER_FORMAT = "pack-quantized"
"""The format of compressed-tensors that keeps integers in 32-bit words, and scales beside them."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The form in which a checkpoint stores floating-point weights in fewer bits.

    Args:
        form: in words, such as `FP8, blocks of 128 x 128`.
        blocks: those that a matrix may be divided into, tried in this order; empty where the number of its scales alone
            says it, and divides its sizes.
        packed: whether two values of four bits share a byte (MXFP4).
        bits: of integers in 32-bit words (compressed-tensors); 0 where there are none.
    """

    form: str
    blocks: tuple[Block, ...] = ()
    packed: bool = False
    bits: int = 0


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """How weights are stored, from the text of a config; None where it says nothing of it.

    Raises:
        InputError: in a form from which the weights cannot be had back.
    """
    for section in _sections(config):
        for key in KEYS:
            if settings := section.get(key):
                # DeepSeek-V4 says beside it how experts are stored.
                beside = {"expert_dtype": config.get("expert_dtype")}
                return _read(key, {**beside, **settings} if isinstance(settings, Mapping) else settings)
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of how weights were stored."""
    kept = {key: value for key, value in config.items() if key not in (*KEYS, "sparsity_config")}
    parts = {key: without_quantization(value) for key, value in kept.items() if _says(value)}
    return kept | parts


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, and the parts in it."""
    yield config
    yield from (value for value in config.values() if isinstance(value, Mapping))


def _says(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in KEYS)


def _read(key: str, settings: Any) -> Quantization:
    method = settings.get("quant_method", key) if isinstance(settings, Mapping) else key
    if key != "quantization_config" or not isinstance(method, str) or method not in METHODS:
        raise _refused(method)
    return METHODS[method](settings)


def _refused(what: Any) -> InputError:
    return InputError(
        f"the model is already quantised ({what})",
        "prune the original model, which its card names as base_model, then quantise the result",
    )


def _fine_grained(settings: Mapping[str, Any]) -> Quantization:
    """`fp8` (DeepSeek-V3, Qwen3): blocks of a fixed size, or a scale for each matrix."""
    experts = ", experts in FP4" if settings.get("expert_dtype") == "fp4" else ""
    if "weight_block_size" not in settings:
        # Tools that scale whole matrices do not mention blocks; transformers takes the usual size then.
        return Quantization(f"FP8{experts}", ((128, 128), TENSOR))
    size = settings["weight_block_size"]
    if size is None:
        return Quantization(f"FP8{experts}")
    block = _block(size, "weight_block_size")
    return Quantization(f"FP8, blocks of {block[0]} x {block[1]}{experts}", (block,))


def _block(size: Any, name: str) -> Block:
    if not (isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)):
        raise InputError(
            f"{name} is {str(size)[:40]}, not two numbers of rows and columns", "download the model again, or mend it"
        )
    return size[0], size[1]


def _compressed_tensors(settings: Mapping[str, Any]) -> Quantization:
    """`compressed-tensors` of symmetric float8 weights, or of symmetric integers."""
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise _refused(f"compressed-tensors, {sparse['format']}")
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    formats = [settings.get("format"), *(group.get("format") for group in schemes if isinstance(group, Mapping))]
    if formats[0] == INTEGER_FORMAT and all(form in (None, INTEGER_FORMAT) for form in formats):
        return _integers(schemes)
    if formats[0] not in FLOAT_FORMATS or any(form not in (None, *FLOAT_FORMATS) for form in formats):
        raise _refused(f"compressed-tensors, {next((form for form in formats if form not in FLOAT_FORMATS), '')}")
    weights = [group.get("weights") for group in schemes if isinstance(group, Mapping)]
    blocks = tuple(dict.fromkeys(_scheme(found) for found in weights if isinstance(found, Mapping)))
    if not blocks:
        raise _refused("compressed-tensors, no scheme of weights")
    return Quantization(f"FP8, {' and '.join(map(_spelled, blocks))}", blocks)


def _integers(schemes: list[Any]) -> Quantization:
    """Symmetric integers in 32-bit words, of one number of bits."""
    found = [group.get("weights") for group in schemes if isinstance(group, Mapping)]
    weights = [scheme for scheme in found if isinstance(scheme, Mapping) and _is_plain(scheme)]
    bits = {int(scheme["num_bits"]) for scheme in weights}
    if len(weights) < len(schemes) or len(bits) != 1:
        raise _refused(f"compressed-tensors, {INTEGER_FORMAT} of another kind than symmetric int4 or int8")
    (number,) = bits
    groups = {int(scheme["group_size"]) for scheme in weights if scheme["strategy"] == "group"}
    scales = f"groups of {' and '.join(map(str, sorted(groups)))}" if groups else "a scale each output"
    return Quantization(f"int{number}, {scales}", bits=number)


def _is_plain(weights: Mapping[str, Any]) -> bool:
    """Whether a scheme is one of symmetric integers that are read, its groups those of consecutive inputs."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    return (
        weights.get("type", "int") == "int"
        and weights.get("num_bits") in (4, 8)
        and weights.get("symmetric", True) is True
        and weights.get("actorder") is None
        and (strategy == "channel" or (strategy == "group" and type(size) is int and size > 0))
    )


def _scheme(weights: Mapping[str, Any]) -> Block:
    """The block of a scheme of compressed-tensors."""
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy", "tensor")
    if kind != "float" or bits != 8:
        raise _refused(f"compressed-tensors, {kind}{bits} weights")
    if weights.get("symmetric", True) is not True:
        raise _refused("compressed-tensors, asymmetric float8 weights")
    if strategy == "block":
        return _block(weights.get("block_structure"), "block_structure")
    if strategy == "group":
        return _block([1, weights.get("group_size")], "1 x group_size")
    if strategy not in ("tensor", "channel"):
        raise _refused(f"compressed-tensors, strategy {strategy}")
    return TENSOR if strategy == "tensor" else CHANNEL


def _spelled(block: Block) -> str:
    names = {TENSOR: "a scale each matrix", CHANNEL: "a scale each output"}
    return names.get(block, f"blocks of {block[0]} x {block[1]}")


def _mxfp4(_: Mapping[str, Any]) -> Quantization:
    """`mxfp4` (gpt-oss): the experts' weights, in the OCP microscaling format."""
    return Quantization("MXFP4", packed=True)


METHODS = {"fp8": _fine_grained, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4}
"""`quant_method` -> what it says; from all others the original weights cannot be had back."""
