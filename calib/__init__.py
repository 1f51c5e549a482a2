"""Frozen calibration sets: text to a hashed token file that a run can be repeated from."""
