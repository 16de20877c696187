"""How well Adam-mini trains, beside AdamW and others: `python -m benchmarks.quality`."""
