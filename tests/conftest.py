import os

import hypothesis
import jax

# Ordinarily as many examples as a short suite has time for: each compiles programs of its own.
hypothesis.settings.register_profile("ordinary", max_examples=20, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))

# Before any device is asked for: tests of sharding need several.
jax.config.update("jax_num_cpu_devices", 8)
