"""Ways to choose block specs: by tracing, by name, by path, by axis name, by measurement."""
