"""Which parameters are matrices for Muon, and which parts of a fused kernel are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import (
    call_noting_parts,
    is_empty,
    is_label_function,
    match_leaves,
    path_of,
    remembered,
    resolve_block_specs,
)
from optax_adam_mini.product import Outer, Spec

if TYPE_CHECKING:
    from jaxtyping import Array
    from optax.contrib import MuonDimensionNumbers


class Pieces(NamedTuple):
    """The matrices into which a kernel is cut along its outputs; one, if it is not cut."""

    numbers: MuonDimensionNumbers
    cuts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Axes, and the start of each piece but the first along each axis."""

    @classmethod
    def of(cls, shape: tuple[int, ...], numbers: MuonDimensionNumbers, spec: Spec | None) -> Pieces:
        """The pieces of a kernel: its parts with separate rows, if a spec is given."""
        runs = spec.runs(shape) if isinstance(spec, Outer) else [()] * len(shape)
        _, outputs = ([axis % len(shape) for axis in axes] for axes in _axes(numbers))
        ends = {
            axis: np.cumsum([size for n, size in runs[axis] for _ in range(n)]) for axis in outputs
        }
        return cls(numbers, tuple((axis, tuple(e[:-1].tolist())) for axis, e in ends.items()))

    @property
    def matrices(self) -> int:
        """How many there are."""
        return math.prod(1 + len(starts) for _, starts in self.cuts)

    def split(self, x: Array) -> list[Array]:
        """The pieces of an array of the kernel's shape."""
        pieces = [x]
        for axis, starts in self.cuts:
            pieces = [part for x in pieces for part in jnp.split(x, starts, axis)]
        return pieces

    def join(self, pieces: list[Array]) -> Array:
        """The array that was split."""
        for axis, starts in reversed(self.cuts):
            n = 1 + len(starts)
            pieces = [
                pieces[i] if n == 1 else jnp.concatenate(pieces[i : i + n], axis)
                for i in range(0, len(pieces), n)
            ]
        return pieces[0]


def specs_of(block_specs: Any, params: Any, is_init: bool) -> list[Spec]:
    """The specs of the matrices, which say which parts have separate rows."""
    labels = [] if block_specs is None else remembered(
        resolve_block_specs, block_specs, params, is_init=is_init)  # fmt: skip
    specs = [spec for _, spec in labels]
    if not is_empty(params) and not any(isinstance(spec, Outer) for spec in specs):
        raise ValueError(
            "parts=True splits a kernel where its outer spec has separate rows, and block_specs "
            "has no outer for any matrix: pass block_specs=infer_block_specs(loss_fn, params, "
            "...), or leave parts out"
        )
    return specs


def rows_of(shape: tuple[int, ...], numbers: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a matrix's rows, along its longer side, and the shape of one number per row."""
    axes = max(_axes(numbers), key=lambda axes: math.prod(shape[axis] for axis in axes))
    axes = tuple(axis % len(shape) for axis in axes)
    return axes, tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def sizes_of(shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> tuple[int, int]:
    """The numbers of inputs and outputs of a matrix."""
    inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in _axes(numbers))
    return inputs, outputs


def scale_of(shape: tuple[int, ...], numbers: MuonDimensionNumbers, consistent_rms: Any) -> Any:
    """The scale of the update of a matrix of this shape."""
    inputs, outputs = sizes_of(shape, numbers)
    if consistent_rms is None:
        return math.sqrt(max(1, outputs / max(1, inputs)))
    return math.sqrt(max(inputs, outputs)) * consistent_rms


def _axes(numbers: MuonDimensionNumbers) -> list[tuple[int, ...]]:
    return [tuple(axes) if isinstance(axes, Sequence) else (axes,) for axes in numbers]


def dimension_numbers(given: Any, params: Any) -> list[Any]:
    """The dimension numbers of every leaf of `params`, None for leaves that go to Adam-mini.

    Raises:
        TypeError: if an entry of `given` is neither dimension numbers nor None.
        ValueError: if a parameter has no entry, if an entry has no parameter, or if dimension
            numbers do not fit a parameter's shape.
    """
    from optax.contrib import MuonDimensionNumbers

    if is_empty(params):  # or `optax.tree.map_params` calls `init` with a placeholder
        return []
    leaves = leaves_with_path(params)
    if given is None:
        is_matrix = lambda p: jnp.ndim(p) == 2 and jnp.issubdtype(jnp.result_type(p), jnp.inexact)
        return [MuonDimensionNumbers() if is_matrix(p) else None for _, p in leaves]
    is_one = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    name = "muon_weight_dimension_numbers"
    if is_label_function(given):
        given = call_noting_parts(name, given, params)
        if given is None:
            raise TypeError(
                f"{name}: the function returned None, expected a pytree of "
                "optax.contrib.MuonDimensionNumbers and None: return it"
            )
    by_path = {path_of(keys): numbers for keys, numbers in leaves_with_path(given, is_leaf=is_one)}
    for path, numbers in by_path.items():
        if not is_one(numbers):
            raise TypeError(
                f"{name}: {'/'.join(path) or 'params'}: expected "
                f"optax.contrib.MuonDimensionNumbers, or None for Adam-mini, got {numbers!r} of "
                f"type {type(numbers).__name__}"
            )
    found = match_leaves(name, "entry", by_path, params)
    for path, leaf, numbers in found:
        if numbers is not None:
            check_fits(path or "params", numbers, jnp.shape(leaf))
    return [numbers if numbers is None else _with_ints(numbers) for _, _, numbers in found]


def _with_ints(numbers: MuonDimensionNumbers) -> MuonDimensionNumbers:
    """The same with Python's integers: Optax takes no others."""
    plain = lambda axes: tuple(map(int, axes)) if isinstance(axes, Sequence) else int(axes)
    return type(numbers)(*map(plain, numbers))


def check_fits(path: str, numbers: MuonDimensionNumbers, shape: tuple[int, ...]) -> None:
    """Refuses dimension numbers that are no axes of a parameter, each once.

    Raises:
        ValueError: if they are not.
    """
    parts = _axes(numbers)
    axes = [axis for part in parts for axis in part]
    known = [a for a in axes if isinstance(a, (int, np.integer)) and not isinstance(a, bool)]
    distinct = {axis % len(shape) for axis in known if -len(shape) <= axis < len(shape)}
    if not all(parts) or len(distinct) < len(axes):
        raise ValueError(
            f"{path} {shape}: {numbers} does not fit: expected axes of the parameter, each once, "
            "at least one of inputs (reduction_axis) and one of outputs (output_axis); give None "
            "to leave the parameter to Adam-mini"
        )
