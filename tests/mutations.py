"""Puts small faults into a copy of the package, one at a time; the tests must catch each.

python -m tests.mutations
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
TESTS = ["tests/test_transform.py", "tests/test_sums.py", "tests/test_golden.py",
         "tests/test_optax_wrappers.py", "tests/test_convert.py", "tests/test_product.py",
         "tests/test_quantized.py", "tests/test_rounding.py", "tests/test_bounded_step.py"]  # fmt: skip

DATAFLOW = "partition/dataflow/"
DATAFLOW_TESTS = [f"tests/{DATAFLOW}test_{name}.py" for name in ("forms", "rows", "infer")]

# (file, what stands there, the fault)
FAULTS = {
    "sum for mean": ("sums.py", "return total / sizes", "return total"),
    "mean of the first block's size": (
        "sums.py",
        "return total / sizes",
        "return total / np.ravel(sizes)[:1].sum()",
    ),
    "wrong axis": ("sums.py", "sum(axis + 2))", "sum(axis + 1))"),
    "blocks repeated in turn": (
        "sums.py",
        "jnp.repeat(part, size, axis=axis + 1)",
        "jnp.concatenate([part] * size, axis + 1)",
    ),
    "squares in the gradient's dtype": (
        "sums.py",
        "(of or (lambda x: x))(x.astype(widen(x.dtype)))",
        "(of or (lambda x: x))(x).astype(widen(x.dtype))",
    ),
    "mean in bfloat16": (
        "sums.py",
        "(of or (lambda x: x))(x.astype(widen(x.dtype)))",
        "(of or (lambda x: x))(x.astype(jnp.bfloat16))",
    ),
    "a long row left out": ("sums_on_cpu.py", "fori_loop(0, steps, add", "fori_loop(1, steps, add"),
    "no bias correction of nu": ("transform.py", "v / t.c2", "v"),
    "no bias correction of mu": ("transform.py", "mu_weight, g_weight = 1 / c1, 0.0", "mu_weight, g_weight = 1.0, 0.0"),
    "b1 for b2": ("transform.py", "t.b2 * v + t.b2_rest * s", "t.b1 * v + t.b1_rest * s"),
    "eps inside the root": (
        "transform.py",
        "(jnp.sqrt(v / t.c2 + t.eps_root) + t.eps)",
        "jnp.sqrt(v / t.c2 + t.eps_root + t.eps)",
    ),
    "eps_root outside the root": (
        "transform.py",
        "(jnp.sqrt(v / t.c2 + t.eps_root) + t.eps)",
        "(jnp.sqrt(v / t.c2) + t.eps_root + t.eps)",
    ),
    "decay not scaled by the learning rate": (
        "transform.py",
        """            add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),""",
        """            optax.scale_by_learning_rate(learning_rate),
            add_decayed_weights(weight_decay, mask),""",
    ),
    "nesterov looks back": ("transform.py", "b1 / c1_next, (1 - b1) / c1", "b1 / c1, (1 - b1) / c1"),
    "count not advanced": (
        "transform.py",
        "return in_tree(0), ScaleByAdamMiniState(count,",
        "return in_tree(0), ScaleByAdamMiniState(state.count,",
    ),
    "complex square without conjugate": (
        "transform.py",
        "jnp.real(x * jnp.conj(x))",
        "jnp.real(x * x)",
    ),
    "integers decay": ("transform.py", "d if u is not None and _is_inexact(p) else u", "d if u is not None else u"),
    "a row times a column, not over their mean": (
        "product.py",
        "ratio = nu[1] * in_b(scale) / in_b(v_ab * scale)",
        "ratio = nu[1]",
    ),
    "one row that overflows stops all": ("product.py", "jnp.where(jnp.isfinite(nu), x, 0)", "x"),
    "blocks of unequal sizes weigh alike": (
        "product.py",
        "share = 1 if isinstance(sizes, float) else sizes / np.max(sizes, initial=1)",
        "share = 1",
    ),
    "codes are cut off": ("quantized.py", "(code + (random_bits(_CUT, m.shape, seed) - extra)) >> _CUT", "(code - extra) >> _CUT"),
    "small numbers are lost": ("quantized.py", ".astype(jnp.float32) + _OFFSET", ".astype(jnp.float32)"),
    "a factor of 1.01 in the sums on CPU": (
        "sums_on_cpu.py",
        "plain = lambda x: jnp.sum(value(x), axis=tuple(whole), keepdims=True)",
        "plain = lambda x: 1.01 * jnp.sum(value(x), axis=tuple(whole), keepdims=True)",
    ),
    "a factor of 1.01 in long rows": (
        "sums_on_cpu.py",
        "return jnp.sum(total, axis=tuple(whole), keepdims=True)",
        "return 1.01 * jnp.sum(total, axis=tuple(whole), keepdims=True)",
    ),
    "the plain form of the bias correction": ("transform.py", "-jnp.expm1(count * _log(decay))", "1 - jnp.exp(count * _log(decay))"),
    "the count wraps": ("transform.py", "jnp.asarray(optax.safe_increment(state.count))", "state.count + 1"),
    "two parameters share a seed": ("transform.py", "count, salt_of(path),", "count, salt_of(()),"),
    "steps are not held": ("transform.py", "return jnp.clip(update, -longest, longest)", "return update"),
    "the same random numbers at every step": ("rounding.py", "mixed(place + seed)", "mixed(place)"),
    "bits of the step left out": ("rounding.py", "mixed(mixed(jnp.asarray(count, jnp.uint32)) +", "mixed("),
    "the same random numbers in every parameter": ("rounding.py", " + jnp.asarray(salt, jnp.uint32))", ")"),
    "the numbers of the moment of a parameter": ("rounding.py", '(path_of(keys), "params")', "path_of(keys)"),
    "parameters rounded toward zero": ("rounding.py", "bits + random_bits(16, x.shape, seed).astype(jnp.uint32)", "bits"),
    "half of the random bits": ("rounding.py", "random_bits(16,", "random_bits(15,"),
    "float32 parameters rounded": (
        "rounding.py",
        "if u is None or not _is_bfloat16(p):",
        "if u is None or not jnp.issubdtype(p.dtype, jnp.floating):",
    ),
    "a difference in bfloat16": ("rounding.py", "-0.0, new - old)", "-0.0, (new - old).astype(jnp.bfloat16))"),
    "gradients not widened": ("rounding.py", "            _widened(updates), state", "            updates, state"),
    "state of parameters in bfloat16": ("rounding.py", "inner.init(_widened(params))", "inner.init(params)"),
    "beyond the largest number to infinity": ("rounding.py", "rounded, nearest)", "rounded, x)"),
    "the old bound for the new moment": (
        "transform.py",
        "kept = write(spec, mu, nu, dtype,",
        "kept = write(spec, mu, v, dtype,",
    ),
    "a value is used by its last use": (
        DATAFLOW + "backward.py",
        "self.acts[place] = self.groups.both(self.acts[place], found)",
        "self.acts[place] = found if not are_all(found, UNSEEN) else self.acts[place]",
    ),
    "what is alone somewhere is coupled": (
        DATAFLOW + "groups.py",
        "        if ALONE in found:\n            return ALONE\n        found.discard(UNSEEN)",
        "        found -= {ALONE, UNSEEN}",
    ),
    "a join for a meet": (
        DATAFLOW + "groups.py",
        "if are_all(a, ALONE) or are_all(b, UNSEEN):\n            return a",
        "if are_all(a, UNSEEN) or are_all(b, ALONE):\n            return b if are_all(a, UNSEEN) else a",
    ),
    "the norm of all heads joins them": (
        DATAFLOW + "groups.py",
        """self.named(("through", id(step), group)) if group in self._members else group""",
        "group",
    ),
    "what is contracted is passed on": (
        DATAFLOW + "backward.py",
        "if gone and not (is_sum or is_taken):",
        "if False:",
    ),
    "a comparison is a use": (
        DATAFLOW + "backward.py",
        "if id(step) not in self._products and not relation.is_stopped:",
        "if id(step) not in self._products:",
    ),
    "a product acts by itself and by its sum": (
        DATAFLOW + "backward.py",
        "if any(product.couplings for product in sums):",
        "if False:",
    ),
    "an axis of the outputs is forgotten": (
        DATAFLOW + "backward.py",
        "                found = self.groups.united(found, axis)\n        found = found.transpose",
        "                found = found.take([0], axis)\n        found = found.transpose",
    ),
    "positions off by one": (
        DATAFLOW + "backward.py",
        "whole[(*at, link.positions[taken])] = found[(*at, taken)]",
        "whole[(*at, link.positions[taken] - 1)] = found[(*at, taken)]",
    ),
    "one head for all of them": (
        DATAFLOW + "backward.py",
        "apart = [1 if axis in axes else size for axis, size in enumerate(shape)]",
        "apart = [1 for axis, size in enumerate(shape)]",
    ),
    "the finer cut of a parameter loses": (
        DATAFLOW + "groups.py",
        "if a is None or b is None:\n            return None",
        "if a is None or b is None:\n            return b if a is None else a",
    ),
    "layers that are indexed are outputs": (
        DATAFLOW + "roles.py",
        "found = {Role.REDUCTION if id(step) in facts.taps else Role.BATCH}",
        "pass",
    ),
    "members are outputs": (DATAFLOW + "roles.py", "if axis in free & members:", "if False:"),
    "a rotation makes parts": (
        DATAFLOW + "rows.py",
        "if where.isdisjoint(others):",
        "if True:",
    ),
    "parts that stay apart are joined": (
        DATAFLOW + "rows.py",
        "if where.isdisjoint(others):",
        "if False:",
    ),
    "outputs that are never used are one block": (
        DATAFLOW + "backward.py",
        "if are_all(acts, ALONE) or np.all(np.equal(acts, UNSEEN)):",
        "if are_all(acts, ALONE):",
    ),
    "features of an operand that runs through are dropped": (
        DATAFLOW + "forward.py",
        "features={**found.features, number: Part(distance, 0, count)},",
        "features={number: Part(distance, 0, count)},",
    ),
    "an axis of data does not move": (
        DATAFLOW + "forward.py",
        "value.axes = [(Factor(size, moves=size > 1),) for size in value.shape]\n\n\ndef _pass",
        "value.axes = [(Factor(size),) for size in value.shape]\n\n\ndef _pass",
    ),
    "a slice of outputs is all of them": (
        DATAFLOW + "forward.py",
        "if last - first + 1 < factor.size:",
        "if False:",
    ),
    "taps are gains": (
        DATAFLOW + "taps.py",
        "slices.add(id(product.slice))",
        "pass",
    ),
}  # fmt: skip


def first_failure(copy: pathlib.Path, tests: list[str]) -> str | None:
    """The first test that fails in the copy, or None. Raises where the tests could not run."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env={"PYTHONPATH": str(copy), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    if not failed:
        raise RuntimeError(f"the tests did not run:\n{run.stdout}{run.stderr}")
    return failed[0].split()[1]


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for part in ("optax_adam_mini", "tests", "docs", "conftest.py", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        if failure := first_failure(copy, TESTS + DATAFLOW_TESTS):
            print(f"without any fault, {failure} fails")
            return 2
        for name, (file, old, new) in FAULTS.items():
            path = copy / "optax_adam_mini" / file
            text = path.read_text()
            if text.count(old) != 1:
                print(f"{name}: {old!r} stands {text.count(old)} times in {file}, expected once")
                return 2
            path.write_text(text.replace(old, new))
            failure = first_failure(copy, DATAFLOW_TESTS if file.startswith(DATAFLOW) else TESTS)
            path.write_text(text)
            missed += failure is None
            print(f"{name}: {failure or 'NOT CAUGHT'}", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
