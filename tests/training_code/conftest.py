"""The recipes of docs/training_code.md, as they stand there: run as a module that is imported.

`.ci/run` makes an environment that has Tunix; elsewhere its tests are skipped.
"""

import re
from pathlib import Path
from types import SimpleNamespace

PAGE = Path(__file__).parents[2] / "docs" / "training_code.md"


def recipe(heading: str) -> SimpleNamespace:
    """What the first block of Python below a heading of the page defines."""
    text = PAGE.read_text(encoding="utf-8")
    start = re.search(rf"^#+ {heading}$", text, re.M).end()
    found = re.compile(r"^```python\n(.*?)^```", re.M | re.S).search(text, start)
    code = "\n" * text.count("\n", 0, found.start(1)) + found[1]
    names = {"__name__": heading}
    exec(compile(code, PAGE, "exec"), names)
    return SimpleNamespace(**names)


def optimizers(specs, mu_dtype=None):
    """AdamW and Adam-mini with the same schedule."""
    import optax

    from optax_adam_mini import adam_mini

    schedule = optax.cosine_decay_schedule(1e-2, 100)
    return optax.adamw(schedule), adam_mini(schedule, mu_dtype=mu_dtype, block_specs=specs)


def bytes_on_a_device(tree) -> int:
    """Of all arrays of a tree, on one device of their mesh."""
    import jax

    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
