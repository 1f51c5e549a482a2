"""Processes, memory, devices and files.

Imports `errors` and `progress` only. A new backend: `device`.
"""
