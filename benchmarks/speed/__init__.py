"""How fast Adam-mini is: updates, whole steps, compilation, calls, reading off the blocks."""
