"""Which automatic class of transformers loads a checkpoint, with all of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL, WRAPPER = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def auto_class(config: PreTrainedConfig) -> str:
    """Name of the automatic class whose model holds all that a checkpoint of this config does; '' where there is none.

    A type may be known as a language model and as a wrapper for images that holds one; then it is the latter, unless
    the config says that the checkpoint was saved by a class of its own for text.
    """
    causal, wrapper = (_class_in(name, config) for name in (CAUSAL, WRAPPER))
    if causal is None or wrapper is None:
        return CAUSAL if causal else WRAPPER if wrapper else ""
    saved_as = getattr(config, "architectures", None) or ()
    return CAUSAL if causal != wrapper and causal in saved_as else WRAPPER


def _class_in(name: str, config: PreTrainedConfig) -> str | None:
    """Name of the model class that an automatic class has for a config, or that comes with the model."""
    import transformers

    own: dict[str, Any] = getattr(config, "auto_map", None) or {}
    mapping = getattr(transformers, name)._model_mapping
    if type(config) not in mapping:
        return str(own[name]) if name in own else None
    found = mapping[type(config)]
    classes = found if isinstance(found, list | tuple) else [found]
    return str(classes[0].__name__)


def text_section(config: PreTrainedConfig) -> str:
    """Name of the part of a config that describes its language model, such as `text_config`; '' for all of it."""
    text = config.get_text_config()
    return next((name for name in config.sub_configs if getattr(config, name, None) is text), "")
