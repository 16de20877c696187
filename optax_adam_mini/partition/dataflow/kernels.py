"""Replaces opaque kernels of known meaning by primitives that have rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr


def written_out(eqn: Any) -> ClosedJaxpr | None:
    """A jaxpr of what a kernel computes, or None if that is unknown."""
    if eqn.primitive.name == "dot_product_attention_fwd_wrapper":
        return _attention(eqn)
    return None


def _attention(eqn: Any) -> ClosedJaxpr | None:
    """The attention of cuDNN, which `jax.nn.dot_product_attention` calls.

    Masks, sequence lengths and dropout move no axis, and are left out.
    """
    *_, page_table, _ = eqn.invars
    if page_table.aval.size:  # paged keys and values have no batch axis
        return None
    has_bias = eqn.params["variadic_args"][0]
    heads_first = eqn.params["layout"] == 1

    def attention(query: Any, key: Any, value: Any, bias: Any, *rest: Any) -> list[Any]:
        if heads_first:
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key)
        if has_bias:
            scores += bias
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)
        if heads_first:
            out = out.swapaxes(1, 2)
        return [out, jax.nn.logsumexp(scores, axis=-1)][: len(eqn.outvars)]

    return jax.make_jaxpr(attention)(*(var.aval for var in eqn.invars))
