"""Measurements of memory, loss and speed behind the README's claims, each run with `python -m`."""
