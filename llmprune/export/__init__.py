"""Uses of a finished folder: verify, pack, export to GGUF, upload, accelerate, generate.

May import `reporting` and all below it. A new format: one module here that reads a folder and writes another one
(`runtime.files.appearing_folder` makes it appear whole or not at all).
"""

from __future__ import annotations

EXPORTS = ("gguf",)
"""Formats for other programs."""
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""Types of the matrices in a GGUF file."""
