"""GCN and GAT in Flax Linen, trained with AdamW and with Adam-mini side by side."""
