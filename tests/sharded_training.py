"""A small Transformer that is trained on meshes, in one process or in several.

python -m tests.sharded_training COORDINATOR NUM_PROCESSES PROCESS_ID DEVICES OUTPUT V
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import adam_mini, infer_block_specs, opt_state_shardings

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB, B, T = 24, 6, 3, 4, 32, 16, 8
STEPS = 20
# Heads do not divide these axes of meshes.
SPECS = {
    "embed": P("fsdp", "tensor"), "qkv": P("fsdp", "tensor"), "out": P("tensor", "fsdp"),
    "norm": P(), "up": P("fsdp", "tensor"), "bias": P("tensor"), "down": P("tensor", "fsdp"),
}  # fmt: skip


def init_params():
    shapes = {
        "embed": (VOCAB, WIDTH), "qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "out": (HEADS * HEAD_DIM, WIDTH), "up": (WIDTH, 96), "down": (96, WIDTH),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"norm": jnp.ones(WIDTH), "bias": jnp.zeros(96)}


def forward(p, tokens):
    x = p["embed"][tokens]
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["norm"]
    fused = y @ p["qkv"]
    ends = HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM
    q, k, v = (part.reshape(*part.shape[:2], -1, HEAD_DIM) for part in jnp.split(fused, ends, -1))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["out"]
    x = x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
    return x @ p["embed"].T


def loss_fn(p, tokens):
    logits = forward(p, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batches():
    """Every token is given by the one before it, most of the time."""
    random = np.random.default_rng(0)
    following = random.permutation(VOCAB)
    for _ in range(STEPS):
        tokens = random.integers(VOCAB, size=(B, T + 1))
        for t in range(1, T + 1):
            kept = random.random(B) < 0.9
            tokens[kept, t] = following[tokens[kept, t - 1]]
        yield tokens.astype(np.int32)


def make_tx(v="mean"):
    params = jax.eval_shape(init_params)
    tokens = jax.ShapeDtypeStruct((B, T + 1), "int32")
    specs = infer_block_specs(loss_fn, params, tokens, v=v)
    tx = adam_mini(1e-2, weight_decay=0.1, block_specs=specs)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def train_step(params, state, tokens, *, tx, loss=loss_fn):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def train_on_one_device(v="mean"):
    tx, params = make_tx(v), init_params()
    state, losses = tx.init(params), []
    step = jax.jit(lambda *args: train_step(*args, tx=tx))
    for tokens in batches():
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
    return losses, jax.tree.map(np.asarray, params)


def make_mesh(axes, axis_type=AxisType.Auto):
    """A mesh that has all three axes, those that are not named of size 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * 3)


def train_on_mesh(mesh, v="mean"):
    """With shardings given to jit, or in the parameters' types where the mesh is explicit."""
    tx = make_tx(v)
    explicit = mesh.axis_types[0] == AxisType.Explicit
    replicated = NamedSharding(mesh, P())
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    whole = lambda params: jax.tree.map(lambda p: jax.sharding.reshard(p, replicated), params)
    loss = (lambda p, x: loss_fn(whole(p), x)) if explicit else loss_fn
    params = jax.jit(init_params, out_shardings=shardings)()
    if explicit:
        state = tx.init(params)
        step = jax.jit(lambda *args: train_step(*args, tx=tx, loss=loss))
        of_batch = replicated
    else:
        of_state = opt_state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=of_state)(params)
        of_batch = NamedSharding(mesh, P(("data", "fsdp")))
        step = jax.jit(
            lambda *args: train_step(*args, tx=tx),
            in_shardings=(shardings, of_state, of_batch),
            out_shardings=(shardings, of_state, replicated),
        )
    losses = []
    for tokens in batches():
        placed = jax.make_array_from_callback(
            tokens.shape, of_batch, lambda index, tokens=tokens: tokens[index]
        )
        params, state, value = step(params, state, placed)
        losses.append(float(value))
    for name, param in params.items():
        assert param.sharding.is_equivalent_to(shardings[name], param.ndim), name
    gather = jax.jit(whole) if explicit else jax.jit(lambda p: p, out_shardings=replicated)
    return losses, jax.tree.map(np.asarray, gather(params))


def train_by_shard_map(mesh, v="mean"):
    """Each device has a part of the batch; gradients are reduced before the update."""
    tx, params = make_tx(v), init_params()
    state, losses = tx.init(params), []

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss_fn)(
            jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params), tokens
        )
        value, grads = jax.lax.pmean((value, grads), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    for tokens in batches():
        params, state, value = mapped(params, state, tokens)
        losses.append(float(value))
    return losses, jax.tree.map(np.asarray, params)


def main(coordinator, num_processes, process_id, devices, output, v):
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.distributed.initialize(coordinator, int(num_processes), int(process_id))
    mesh = make_mesh({"fsdp": len(jax.devices()) // 2, "tensor": 2})
    losses, params = train_on_mesh(mesh, v)
    if jax.process_index() == 0:
        np.savez(output, losses=losses, **params)


if __name__ == "__main__":
    main(*sys.argv[1:])
