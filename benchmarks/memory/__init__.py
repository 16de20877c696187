"""How much memory Adam-mini saves, computed or compiled and not run."""
