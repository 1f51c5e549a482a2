"""Models by name, for the scripts here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from llmprune.sources.models import Source


def find_model(name: str) -> Source:
    """Where a model lies, and its config.

    Args:
        name: a folder, a name on the Hub, a `.gguf` file, or `demo`.

    Raises:
        InputError: there is no such model.
    """
    from llmprune.progress import Progress
    from llmprune.sources.demo import default_cache
    from llmprune.sources.models import open_source

    return open_source(name, revision=None, cache=default_cache(), trust_remote_code=False, progress=Progress())


def load_stock(folder: Path | str, **options: Any) -> Any:
    """A model as plain transformers loads it, ready to compute: a wrapper for images with all that it holds.

    Args:
        folder: of the model.
        options: of `from_pretrained`.
    """
    import transformers

    from llmprune.model.auto_class import auto_class

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    loader = getattr(transformers, auto_class(config))
    return loader.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options).eval()
