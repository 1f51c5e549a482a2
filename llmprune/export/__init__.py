"""Uses of a finished folder: verify, pack, upload, accelerate, generate.

May import `reporting` and all below it. A new format: one module here that reads a folder and writes another one
(`runtime.files.appearing_folder` makes it appear whole or not at all).
"""
