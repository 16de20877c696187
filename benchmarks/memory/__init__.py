"""How much memory Adam-mini saves: computed from shapes, compiled, or measured on one device."""
