import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    by_path,
    flax_layers,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)

PARAMS = {
    "embed": jnp.ones((9, 4)),
    "layers": [{"query": jnp.ones((4, 4)), "bias": jnp.ones(4)} for _ in range(2)],
}


def test_first_match_wins():
    label = by_path(
        [("layers/1/query", per_tensor()), ("query$", per_head(2)), ("^embed", per_token())],
        default=per_element(),
    )
    assert label(PARAMS) == {
        "embed": per_token(),
        "layers": [
            {"query": per_head(2), "bias": per_element()},
            {"query": per_tensor(), "bias": per_element()},
        ],
    }


def test_default_may_be_a_label_function():
    params = {"odd": {"mystery": jnp.ones((3, 3))}, "dense": {"kernel": jnp.ones((3, 5))}}
    with pytest.raises(ValueError, match=r"odd/mystery \(3, 3\): its name is none of Flax's own"):
        flax_layers()(params)
    label = by_path([("mystery", per_head(3))], default=flax_layers())
    assert label(params) == {
        "odd": {"mystery": per_head(3)},
        "dense": {"kernel": per_neuron()},
    }


def test_rules_are_matched_on_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    label = by_path([("embed", per_token())], default=per_tensor())
    assert label(shapes) == label(PARAMS)


def test_a_part_of_the_tree_need_not_match_every_rule():
    label = by_path([("embed", per_token()), ("layers", per_tensor())])
    assert label({"embed": PARAMS["embed"], "layers": optax.MaskedNode()})["embed"] == per_token()
    tx = optax.masked(adam_mini(1e-3, block_specs=label), {"embed": True, "layers": False})
    state = tx.init(PARAMS)
    optax.tree.map_params(tx, lambda x: x, state)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    assert updates["layers"] is not None


@pytest.mark.parametrize(
    ("rules", "default", "error", "text"),
    [
        ([("embd", per_token())], per_tensor(), ValueError,
         "the rule 'embd' matches no parameter; the closest paths are embed, "),
        ([("embed", per_token())], None, ValueError,
         "no rule matches layers/0/bias (4,), layers/0/query (4, 4), layers/1/bias (4,), "
         "layers/1/query (4, 4): add a rule for it, or a default"),
        ([("(", per_token())], None, ValueError, "'(' is no regular expression"),
        ([("embed", "token")], None, TypeError,
         "the rule 'embed' must give a BlockSpec such as per_neuron(), got 'token' of type str"),
        (["embed"], None, TypeError, "is a pair (pattern, spec), got 'embed'"),
        ([], "neuron", TypeError, "default must be a BlockSpec or a label function, got 'neuron'"),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused(rules, default, error, text):
    with pytest.raises(error) as raised:
        by_path(rules, default=default)(PARAMS)
    assert text in str(raised.value)


def test_rules_are_ordered_by_the_user_not_by_length():
    label = by_path([("", per_tensor()), ("embed", per_token())])
    specs = jax.tree.leaves(label(PARAMS), is_leaf=lambda x: isinstance(x, BlockSpec))
    assert set(specs) == {per_tensor()}


def test_variables_that_no_rule_names_are_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    # A spec as the default is an explicit choice.
    by_path([("kernel", per_neuron())], default=per_element())(nnx.state(Model()))
    label = by_path([("kernel", per_neuron())], default=flax_layers())
    with pytest.raises(ValueError, match=r"by_path: norm/mean, a BatchStat, .*not parameters"):
        label(nnx.state(Model()))
    label(nnx.state(Model(), nnx.Param))
