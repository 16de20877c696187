"""How fast Adam-mini is: updates, whole steps, compilation, calls, and inference of blocks."""
