"""Models by name, for the scripts here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
