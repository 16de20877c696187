"""A language model, fine-tuned with AdamW and with Adam-mini side by side."""
