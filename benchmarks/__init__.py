"""Measurements behind the README's claims, one folder per claim, each run with `python -m`."""
