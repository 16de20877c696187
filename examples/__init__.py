"""Examples of Adam-mini, one folder each, run as `python -m examples.<name>`."""
