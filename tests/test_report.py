import io
import re

import jax
import jax.numpy as jnp
import optax
import pytest
import rich.console
from optax.contrib import MuonDimensionNumbers

from optax_adam_mini import (
    adam_mini,
    block_table,
    by_path,
    flax_layers,
    fused,
    muon_mini,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    stochastic_rounding,
)
from optax_adam_mini.report import describe

QKV = fused(-1, [(8, per_head(2)), (8, per_head(2)), (8, per_neuron())])


def show(table):
    console = rich.console.Console(width=160, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_lists_the_blocks_and_bytes_of_each_parameter(capsys):
    params = {
        "wte": {"embedding": jax.ShapeDtypeStruct((100, 8), jnp.bfloat16)},
        "h": [
            {"qkv": {"kernel": jax.ShapeDtypeStruct((8, 24), jnp.float32)},
             "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
            for _ in range(3)
        ],
    }  # fmt: skip
    text = show(block_table(params, by_path([("qkv", QKV)], default=flax_layers())))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    heads = [cell.strip() for cell in re.split("[┃│]", text.splitlines()[2])[1:-1]]
    assert heads == ["parameter", "shape", "cut", "numbers", "bytes of v"]
    assert rows == [
        ["h/*/bias", "3 x (8,)", "8 elements x (1,)", "24", "96"],
        ["h/*/qkv/kernel", "3 x (8, 24)",
         "2 heads x (8, 4) + 2 heads x (8, 4) + 8 neurons x (8, 1)", "36", "144"],
        ["wte/embedding", "(100, 8)", "100 tokens x (1, 8)", "100", "400"],
        ["total", "1,400 numbers", "", "160", "640"],
    ]  # fmt: skip
    # AdamW: mu and nu of 800 bfloat16 and 600 float32; here mu of those and 160 float32.
    assert "v: 1,400 numbers in Adam, 160 here, 88.57% removed" in text
    assert "optimizer state: 4,640 bytes, 58.00% of AdamW's 8,000" in text
    # 1,600 bytes of bfloat16 and 2,400 of float32.
    assert "parameters, gradients and state: 2 x 4,000 + 4,640 bytes, 9.03 a parameter" in text
    assert capsys.readouterr().out == ""


def test_bfloat16_training_in_8_bits_takes_five_bytes_a_parameter():
    """Two of the parameter, two of the gradient, one of the state: as the table says, and in fact."""
    params = {"kernel": jnp.ones((1024, 512), jnp.bfloat16)}
    tx = stochastic_rounding(adam_mini(1e-3, mu_dtype=jnp.int8, block_specs=per_neuron()))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert abs((2 * params["kernel"].nbytes + state) / params["kernel"].size - 5) < 0.01
    caption = block_table(params, per_neuron(), mu_dtype=jnp.int8).caption
    assert "2 x 1,048,576 + 526,336 bytes, 5.00 a parameter; of AdamW in float32, 16" in caption


def test_rows_are_joined_only_where_they_are_alike():
    params = {f"Dense_{i}": {"kernel": jnp.ones((2, 2 + i // 2))} for i in range(3)}
    text = show(block_table(params, flax_layers()))
    assert "Dense_*/kernel" in text
    assert "Dense_2/kernel" in text


def test_names_with_a_star_are_no_numbers():
    params = {"a*": jnp.ones(3), "a1": jnp.ones(3)}
    assert list(block_table(params, per_element()).columns[0].cells)[:2] == ["a*", "a1"]


def test_a_label_function_counts_for_the_parameters_of_adam_mini():
    """If only a matrix of Muon has an outer, the state has one tree."""
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    specs = by_path([("w", outer(per_neuron(axis=0), per_neuron()))], default=per_element())
    tx = muon_mini(0.1, block_specs=specs)
    found = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)) if x.size > 3)
    table = block_table(params, specs, muon_weight_dimension_numbers={
        "w": MuonDimensionNumbers(), "b": None})  # fmt: skip
    assert f"optimizer state: {found} bytes" in table.caption


def test_a_cut_is_described_in_words():
    assert describe(per_head(12), (768, 768)) == "12 heads x (768, 64)"
    assert describe(per_head(12, axis=-2, stacked=0), (32, 768, 12, 64)) == (
        "384 heads x (1, 768, 1, 64)"
    )
    assert describe(per_tensor(), (768,)) == "1 tensor x (768,)"
    assert describe(per_tensor(), ()) == "1 tensor x ()"
    assert describe(per_element(), (0, 3)) == "0 elements x (0, 1)"
    by_head = fused(-1, [(4, per_tensor()), (4, per_tensor()), (4, per_neuron())] * 3)
    assert describe(by_head, (8, 36)) == (
        "3 x [1 tensor x (8, 4) + 1 tensor x (8, 4) + 4 neurons x (8, 1)]"
    )
    stacked = fused(-1, [(8, per_head(2)), (8, per_neuron())], stacked=0)
    assert describe(stacked, (3, 8, 16)) == "6 heads x (1, 8, 4) + 24 neurons x (1, 8, 1)"


def test_print_prints_the_table(capsys):
    table = block_table({"kernel": jnp.ones((4, 8))}, per_neuron())
    print(table)  # noqa: T201
    printed = capsys.readouterr().out
    assert "8 neurons x (4, 1)" in printed
    assert "of AdamW's" in printed
    assert "\x1b" not in printed


LONG = "/".join(["encoder", "x" * 60, "multi_head_dot_product_attention", "y" * 35, "query/kernel"])


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_print_fits_the_terminal(width, monkeypatch):
    """No path, shape or cut is lost at any width, and 200 equal layers are one row."""
    monkeypatch.setenv("COLUMNS", str(width))
    params = {
        LONG: jax.ShapeDtypeStruct((24, 3, 8), jnp.float32),
        "h": [{"qkv": jax.ShapeDtypeStruct((768, 2304), jnp.float32)} for _ in range(200)],
    }
    matrix = outer(per_neuron(axis=0), per_neuron())
    lines = str(block_table(params, {LONG: per_head(3, axis=-2), "h": matrix})).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("qkv" in line for line in lines) == 1
    for text in ("query/kernel", "(24, 3, 8)", "200 x", "(768, 2304)", "614,400", "2,457,600"):
        assert any(text in line for line in lines), text
    rows = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    words = " ".join(row[0 if len(row) == 3 else 2].strip() for row in rows)
    assert "3 heads x (24, 1, 8)" in words
    assert "768 rows + 2,304 columns" in words
    assert LONG in "".join(row[0].strip() for row in rows)


def test_caption_says_what_mu_is_counted_in():
    """Without mu_dtype the table of a run in 8 bits would count mu in the parameters' dtypes."""
    params = {"kernel": jnp.ones((4, 8), jnp.bfloat16), "bias": jnp.ones(8)}
    assert block_table(params, per_neuron()).caption.endswith(
        "mu: bfloat16 and float32; for 8 bits: block_table(params, specs, mu_dtype=jnp.int8)"
    )
    caption = block_table(params, per_neuron(), mu_dtype=jnp.int8).caption
    assert "for 8 bits" not in caption


@pytest.mark.parametrize("mu_dtype", [None, "int8"])
@pytest.mark.parametrize("is_outer", [True, False])
def test_the_table_shows_the_matrices_and_bytes_of_muon(mu_dtype, is_outer):
    """The bytes are those of the state of muon_mini, without counters and coefficients."""
    shape = jax.ShapeDtypeStruct
    params = {
        "conv": shape((3, 3, 2, 5), jnp.bfloat16),
        "h": [{"kernel": shape((4, 8, 24), jnp.float32)} for _ in range(2)],
        "table": shape((100, 8), jnp.float32),
        "bias": shape((8,), jnp.float32),
    }
    numbers = {
        "conv": MuonDimensionNumbers((0, 1, 2), 3),
        "h": MuonDimensionNumbers(1, 2),
        "table": None,
        "bias": None,
    }
    table = outer(per_neuron(axis=0), per_neuron()) if is_outer else per_neuron()
    # Specs of Muon's matrices are ignored, even those that do not fit.
    specs = {"conv": per_head(7), "h": outer(per_neuron(axis=0), per_neuron()), "table": table,
             "bias": per_element()}  # fmt: skip
    found = block_table(params, specs, mu_dtype, muon_weight_dimension_numbers=numbers)
    cells = list(zip(*(column.cells for column in found.columns), strict=True))
    assert ("conv", "(3, 3, 2, 5)", "matrix (18 x 5), Muon", "0", "0") in cells
    assert ("h/*/kernel", "2 x (4, 8, 24)", "4 matrices (8 x 24), Muon", "0", "0") in cells
    cut = "100 rows + 8 columns" if is_outer else "8 neurons x (100, 1)"
    assert next(row for row in cells if row[0] == "table")[2] == cut

    tx = muon_mini(
        0.02, mu_dtype=mu_dtype, muon_weight_dimension_numbers=numbers, block_specs=specs
    )
    state = jax.eval_shape(tx.init, params)
    mu, nu = optax.tree.get_all_with_path(state, "mu"), optax.tree.get(state, "nu")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(([leaf for _, leaf in mu], nu)))
    assert f"optimizer state: {size:,} bytes" in found.caption


def test_dimension_numbers_that_do_not_fit_are_refused():
    params = {"kernel": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match=r"kernel \(4, 6\): .*does not fit"):
        block_table(params, per_neuron(), muon_weight_dimension_numbers=MuonDimensionNumbers(0, 2))


def test_paths_that_join_alike_have_specs_of_their_own():
    params = {"a/b": jnp.ones((4, 6)), "a": {"b": jnp.ones((4, 6))}}
    table = block_table(params, {"a/b": per_neuron(), "a": {"b": per_tensor()}})
    assert [*table.columns[3].cells][-1] == "7"


def test_names_that_look_like_markup_are_shown_as_they_are():
    params = {"[/x]": jnp.ones((3, 4)), "a[b]": jnp.ones((3, 4)), "q:heart:z": jnp.ones(3)}
    printed = str(block_table(params, per_neuron()))
    assert all(name in printed for name in params)


def test_random_keys_are_refused_by_path():
    params = {"dropout": {"key": jax.random.key(0)}, "scale": jnp.ones(3)}
    with pytest.raises(TypeError, match=r"^dropout/key: expected numbers, got dtype key"):
        block_table(params, per_element())


def test_matrices_of_muon_need_no_specs():
    params = {"c_attn": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)}}
    numbers = {"c_attn": {"kernel": MuonDimensionNumbers(), "bias": None}}
    block_table(params, flax_layers(), muon_weight_dimension_numbers=numbers)
