"""`opt_state_shardings`: where each part of an optimizer state lives on a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from optax_adam_mini.boxes import kept_names, leaves_with_path
from optax_adam_mini.labels import match_leaves, path_of, shapes_of

if TYPE_CHECKING:
    from jaxtyping import PyTree

Path = tuple[str, ...]


def opt_state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    param_shardings: PyTree,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> PyTree[NamedSharding]:
    """The shardings of an optimizer state, from those of the parameters.

    An array of the state is sharded like its parameter along each axis where
    both have the same size, and along no other axis. So `mu` and accumulated
    gradients are sharded like the parameter, and `nu` along the axes with a
    block at each index. Everything else (counts, hyper-parameters) is
    replicated. To shard the state more finely than the parameters (ZeRO-1),
    pass finer shardings.

    You do not need this with explicit sharding (`jax.make_mesh` makes such
    meshes), where `tx.init` gives the right shardings, or if Flax's metadata
    names the axes of the parameters: the state has the same metadata, and Flax
    places it (docs/sharding.md).

    Args:
        tx: any transformation, in any chain or wrapper.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        param_shardings: pytree like the parameters, or a prefix of it, of
            `NamedSharding`s, or of `PartitionSpec`s and `None` (replicated)
            together with `mesh`. Flax's `nnx.get_partition_spec`,
            `nn.get_partition_spec` and `nn.get_sharding` make such trees.
        mesh: the mesh, if there are `PartitionSpec`s or no parameters.

    Returns:
        A pytree like `tx.init(params)`, for `jax.jit(tx.init,
        out_shardings=...)`, for `jax.device_put`, and for restoring
        checkpoints.

    Raises:
        TypeError: if a sharding is none of these.
        ValueError: if a parameter has no sharding, or one with more axes than
            the parameter; if axes of the mesh do not divide the parameter; or
            if there are `PartitionSpec`s and no mesh.

    Examples:
        >>> mesh = jax.sharding.AbstractMesh((2,), ("fsdp",))
        >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
        >>> specs = {"kernel": jax.sharding.PartitionSpec("fsdp"), "bias": None}
        >>> found = opt_state_shardings(adam_mini(1e-3), params, specs, mesh=mesh)
        >>> found[0].mu["kernel"].spec, found[0].nu["kernel"].spec, found[0].count.spec
        (P('fsdp', None), P(None, None), P())
    """
    found = _resolve(param_shardings, params, mesh)
    # The parameters' own shardings are ignored: only `param_shardings` counts.
    bare = jax.tree.unflatten(*shapes_of(params))
    state = jax.eval_shape(tx.init, bare)
    if isinstance(bare, optax.LookaheadParams):  # the inner state is of the fast ones alone
        bare, found = bare.fast, found[: len(found) // 2]
    shapes = {path_of(keys): leaf.shape for keys, leaf in leaves_with_path(bare)}
    shardings = dict(zip(shapes, found, strict=True))
    meshes = {sharding.mesh for sharding in shardings.values()}
    meshes |= {mesh} if mesh is not None and not meshes else set()  # there are no parameters
    if len(meshes) != 1:
        raise ValueError(
            f"opt_state_shardings: param_shardings has {len(meshes)} meshes: put all parameters on "
            "one mesh; if there are no parameters, give mesh="
        )
    replicated = NamedSharding(meshes.pop(), PartitionSpec())

    def of_leaf(path: Path, leaf: Any) -> NamedSharding:
        shape, sharding = shapes[path], shardings[path]
        if len(leaf.shape) != len(shape):
            return replicated
        return sharding.update(spec=PartitionSpec(*kept_names(sharding.spec, leaf.shape, shape)))

    def is_like_params(node: Any) -> bool:
        leaves = leaves_with_path(node)
        return type(node) is type(bare) and all(path_of(keys) in shapes for keys, _ in leaves)

    def of_node(node: Any) -> Any:
        if not is_like_params(node):
            return jax.tree.map(lambda _: replicated, node)
        found = [of_leaf(path_of(keys), leaf) for keys, leaf in leaves_with_path(node)]
        return jax.tree.unflatten(jax.tree.structure(node), found)

    return jax.tree.map(of_node, state, is_leaf=is_like_params)


def _resolve(given: Any, params: Any, mesh: Mesh | AbstractMesh | None) -> list[NamedSharding]:
    """The checked sharding of every parameter."""
    is_one = lambda x: x is None or isinstance(x, (jax.sharding.Sharding, PartitionSpec))
    by_path = {path_of(keys): one for keys, one in leaves_with_path(given, is_leaf=is_one)}
    paths = [path_of(keys) for keys, _ in leaves_with_path(params)]
    # None of a parameter that is not here, as Flax's trees have it, asks for nothing.
    by_path = {
        path: one
        for path, one in by_path.items()
        if one is not None or any(own[: len(path)] == path for own in paths)
    }
    return [
        _checked(path or "params", sharding, jnp.shape(leaf), mesh)
        for path, leaf, sharding in match_leaves("param_shardings", "sharding", by_path, params)
    ]


def _checked(
    path: str, sharding: Any, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None
) -> NamedSharding:
    if sharding is None:
        sharding = PartitionSpec()
    is_spec = isinstance(sharding, PartitionSpec)
    if is_spec and mesh is None:
        raise ValueError(
            f"{path}: got {sharding}, and no mesh: call opt_state_shardings with mesh="
        )
    if not is_spec and not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{path}: expected a NamedSharding, or a PartitionSpec and mesh=, got {sharding!r} of "
            f"type {type(sharding).__name__}"
        )
    spec = sharding if is_spec else sharding.spec
    try:
        if len(spec) > len(shape):
            raise ValueError(f"expected a spec of at most {len(shape)} axes")
        made: Any = NamedSharding(mesh, spec) if is_spec and mesh is not None else sharding
        made.shard_shape(shape)
    except ValueError as error:
        raise ValueError(f"{path} {shape}: {spec} does not fit: {error}") from error
    return made
