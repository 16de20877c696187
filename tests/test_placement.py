"""Flax places Adam-mini's state on a mesh where it places AdamW's, in each of its own ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import (
    ScaleByAdamMiniState,
    adam_mini,
    by_logical_axes,
    by_path,
    opt_state_shardings,
    outer,
    per_element,
    per_head,
    per_neuron,
)

MATRIX = outer(per_neuron(axis=0), per_neuron())
SPECS = by_path([("kernel", MATRIX)], default=per_element())
KINDS = {
    "adamw": lambda: optax.adamw(1e-2),
    "mean": lambda: adam_mini(1e-2, block_specs=by_path([("up", per_head(3))], per_neuron())),
    "outer": lambda: adam_mini(1e-2, block_specs=SPECS),
    "outer, int8": lambda: adam_mini(1e-2, mu_dtype=jnp.int8, block_specs=SPECS),
    "two groups": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"mini": adam_mini(1e-2, block_specs=SPECS), "sgd": optax.sgd(1e-2, 0.9)},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda keys, _: "mini" if "up" in jax.tree_util.keystr(keys) else "sgd", params
            ),
        ),
    ),
}
MESHES = {
    "auto": ((4, 2), AxisType.Auto),
    "explicit": ((4, 2), AxisType.Explicit),
    "one device": ((1, 1), AxisType.Auto),
}
X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def mesh_of(name):
    shape, kind = MESHES[name]
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(kind,) * 2, devices=devices)


# Explicit axes must not shard what is contracted: Flax would have to be told the output's sharding.
NAMES = {
    AxisType.Auto: (("fsdp", "tensor"), ("tensor", "fsdp")),
    AxisType.Explicit: ((None, "tensor"), (None, "fsdp")),
}


class Model(nnx.Module):
    def __init__(self, rngs, kind=AxisType.Auto):
        self.is_explicit = kind == AxisType.Explicit
        init = nnx.initializers.lecun_normal()
        two = lambda *names: nnx.with_partitioning(init, names)
        self.up = nnx.Linear(16, 24, kernel_init=two(*NAMES[kind][0]), use_bias=False, rngs=rngs)
        self.down = nnx.Linear(24, 16, kernel_init=two(*NAMES[kind][1]), use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.up(x))
        return self.down(jax.sharding.reshard(x, P()) if self.is_explicit else x)


def nnx_loss(model):
    return jnp.mean((model(X) - 1) ** 2)


def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(nnx_loss)(model)
    optimizer.update(model, grads)
    return loss


def train(model, optimizer):
    step = nnx.jit(nnx_step)
    return [float(step(model, optimizer)) for _ in range(3)]


def plain(tx):
    with nnx.use_eager_sharding(False):
        model = Model(nnx.Rngs(0))
        return train(model, nnx.Optimizer(model, tx, wrt=nnx.Param))


def nnx_eager(tx, mesh):
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0), mesh.axis_types[0])
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return train(model, optimizer), nnx.state(optimizer), nnx.state(model, nnx.Param)


def nnx_constrained(tx, mesh):
    with jax.set_mesh(mesh):

        @nnx.jit
        def create():
            model = Model(nnx.Rngs(0), mesh.axis_types[0])
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            for part in (model, optimizer):
                state = nnx.state(part)
                specs = nnx.get_partition_spec(state)
                nnx.update(part, jax.lax.with_sharding_constraint(state, specs))
            return model, optimizer

        model, optimizer = create()
        return train(model, optimizer), nnx.state(optimizer), nnx.state(model, nnx.Param)


def nnx_placed(tx, mesh):
    with nnx.use_eager_sharding(False):
        model = Model(nnx.Rngs(0), mesh.axis_types[0])
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for part in (model, optimizer):
            state = nnx.state(part)
            nnx.update(part, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
        with jax.set_mesh(mesh):
            losses = train(model, optimizer)
        return losses, nnx.state(optimizer), nnx.state(model, nnx.Param)


class Linen(nn.Module):
    boxes: str

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        box = {"mesh": nn.with_partitioning, "logical": nn.with_logical_partitioning}[self.boxes]
        names = {"mesh": ("fsdp", "tensor"), "logical": ("embed", "mlp")}[self.boxes]
        dense = functools.partial(nn.Dense, use_bias=False)
        x = jnp.tanh(dense(24, kernel_init=box(init, names), name="up")(x))
        return dense(16, kernel_init=box(init, names[::-1]), name="down")(x)


RULES = (("embed", "fsdp"), ("mlp", "tensor"))


def linen(boxes, tx, mesh, folder=None):
    model = Linen(boxes)

    def create(key):
        params = model.init(key, X)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        fn = lambda p: jnp.mean((model.apply({"params": p}, X) - 1) ** 2)
        loss, grads = jax.value_and_grad(fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    abstract = jax.eval_shape(create, jax.random.key(0))
    if boxes == "mesh":
        shardings = nn.get_sharding(abstract, mesh)
    else:
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    if folder is not None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "saved", nn.unbox(state))
            checkpointer.wait_until_finished()
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                nn.unbox(abstract), nn.unbox(shardings),
            )  # fmt: skip
            restored = checkpointer.restore(folder / "saved", target)
        state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(restored))
    losses = []
    for _ in range(3):
        state, loss = step(state)
        losses.append(float(loss))
    return losses, state.opt_state, state.params


WAYS = {
    "nnx, eager": nnx_eager,
    "nnx, constrained": nnx_constrained,
    "nnx, placed": nnx_placed,
    "linen": functools.partial(linen, "mesh"),
    "linen, logical": functools.partial(linen, "logical"),
}
# The way, the mesh and the optimizer: the others go through the same functions.
QUICK = {
    ("nnx, eager", "auto", "outer, int8"),
    ("linen", "auto", "outer, int8"),
    ("linen", "auto", "two groups"),
}


def shards(tree):
    """The shapes on one device of all arrays, by their sizes."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.ndim]
    return sorted((x.shape, x.sharding.shard_shape(x.shape)) for x in arrays)


@pytest.mark.parametrize(
    ("way", "mesh", "kind"),
    [
        pytest.param(way, mesh, kind, marks=[] if (way, mesh, kind) in QUICK else pytest.mark.slow)
        for way in WAYS
        for mesh in MESHES
        for kind in KINDS
        if not (mesh == "explicit" and way.startswith("linen"))  # Linen's Dense takes no such mesh
    ],
)
def test_training_works_where_flax_places_the_state(way, mesh, kind):
    mesh, tx = mesh_of(mesh), KINDS[kind]()
    losses, state, params = WAYS[way](tx, mesh)
    if way.startswith("nnx"):
        np.testing.assert_allclose(
            losses, plain(KINDS[kind]()), rtol=2e-2 if "int8" in kind else 1e-4
        )
    assert losses[-1] < losses[0]
    # Every array has the sharding that opt_state_shardings gives.
    names = NAMES[mesh.axis_types[0]]
    of_param = {(16, 24): P(*names[0]), (24, 16): P(*names[1])}
    bare = {
        name: {"kernel": jnp.zeros(shape)} for name, shape in (("up", (16, 24)), ("down", (24, 16)))
    }
    specs = {name: {"kernel": of_param[p["kernel"].shape]} for name, p in bare.items()}
    expected = opt_state_shardings(tx, bare, specs, mesh=mesh)
    shapes = jax.eval_shape(tx.init, bare)
    wanted = sorted(
        (x.shape, s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(expected), strict=True)
        if x.ndim
    )
    assert shards(state) == wanted
    assert shards(params) == sorted(
        (shape, NamedSharding(mesh, spec).shard_shape(shape)) for shape, spec in of_param.items()
    )


@pytest.mark.parametrize("kind", ["adamw", "outer, int8"])
@pytest.mark.parametrize("boxes", ["mesh", "logical"])
@pytest.mark.slow
def test_a_checkpoint_is_restored_to_the_shardings_of_linen(boxes, kind, tmp_path):
    mesh = mesh_of("auto")
    losses, _, _ = linen(boxes, KINDS[kind](), mesh, tmp_path)
    expected, _, _ = linen(boxes, KINDS[kind](), mesh)
    assert losses == expected


def test_mu_and_nu_are_trees_like_the_parameters():
    """`jax.tree.map` with the parameters, `optax.tree.map_params`, `optax.tree.get`."""
    params = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    names = {"kernel": "kernel", "bias": "bias"}
    mean = adam_mini(1e-2, block_specs=per_neuron())
    state = mean.init(params)
    jax.tree.map(lambda p, m, v: None, params, state[0].mu, state[0].nu)
    assert optax.tree.get(state, "nu")["kernel"].shape == (1, 6)
    for tx in (mean, adam_mini(1e-2, block_specs={"kernel": MATRIX, "bias": per_element()})):
        mapped = optax.tree.map_params(tx, lambda _, name: name, tx.init(params), names)
        assert isinstance(mapped[0], ScaleByAdamMiniState)
        nu = mapped[0].nu
        assert (nu if tx is mean else nu.a) == names
        assert tx is mean or nu.b == names
        assert mapped[0].mu == names


@pytest.mark.slow
def test_lora_adapters_and_stacked_layers_are_placed_as_their_parameters():
    with jax.set_mesh(mesh_of("auto")):
        lora = nnx.LoRA(
            16, 4, 24, base_module=nnx.Linear(16, 24, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
        )
        optimizer = nnx.Optimizer(lora, adam_mini(1e-2, block_specs=MATRIX), wrt=nnx.LoRAParam)
        loss = lambda model: jnp.mean((model(X) - 1) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(lora)
        optimizer.update(lora, grads)

        @nnx.split_rngs(splits=4)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "fsdp"})
        def layers(rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
            return nnx.Linear(16, 16, kernel_init=init, use_bias=False, rngs=rngs)

        stack = layers(nnx.Rngs(0))
        tx = adam_mini(1e-2, block_specs=outer(per_neuron(1), per_neuron(), stacked=0))
        optimizer = nnx.Optimizer(stack, tx, wrt=nnx.Param)
        nu = optimizer.opt_state[0].nu
        assert nu.a.kernel.get_metadata("out_sharding") == ("fsdp", None, None)
        assert nu.b.kernel.get_metadata("out_sharding") == ("fsdp", None, "tensor")
        assert nu.b.kernel.get_value().sharding.shard_shape((4, 1, 16)) == (1, 1, 8)


def test_linens_boxes_of_nnx_variables_keep_their_names():
    """`nnx.bridge.to_linen`, as in MaxText: the names are in the box's metadata."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    tx = adam_mini(1e-3, block_specs=by_logical_axes([(("fsdp", "tensor"), ("tensor",))]))
    with nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        model = nnx.bridge.to_linen(nnx.Linear, 16, 24, kernel_init=init, use_bias=False)

        def create(key):
            params = model.init(key, jnp.ones((8, 16)))["params"]
            return params, tx.init(params)

        shardings = nn.get_sharding(jax.eval_shape(create, jax.random.key(0)), mesh)
        params, state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    assert jax.tree.leaves(state[0].mu)[0].sharding.spec == P("fsdp", "tensor")
    (nu,) = jax.tree.leaves(state[0].nu)
    assert nu.shape == (1, 24)
    assert nu.sharding.spec == P(None, "tensor")
    tx.update(params, state, params)
