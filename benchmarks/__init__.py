"""Measurements of what the README claims, one folder a claim, each run as `python -m`."""
