"""Processes, memory, devices and files.

Of this package imports `errors` and `progress` only. A new backend: `device`.
"""
