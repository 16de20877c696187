"""How well Adam-mini trains, compared with AdamW and others: `python -m benchmarks.quality`."""
