"""Processes, memory, devices and files: what the machine offers.

Imports `errors` and `progress` only. A new backend: `device`.
"""
