"""Exact Hessians of small models, with the blocks of Adam-mini outlined."""
