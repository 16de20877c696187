"""Denoising diffusion in Flax NNX, trained with AdamW and with Adam-mini side by side."""
