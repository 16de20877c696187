"""One rule for each primitive: how the axes of its results come from the axes of its operands.

A rule returns a `Relation`. Most primitives only move axes about, and their rules are a list of
links. Where a parameter meets data, the rule says what that makes of the parameter's axes; where
activations meet in an inner product, it couples the axes that are contracted.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.program import Step

Axes = tuple[int, ...]


class Kind(enum.IntEnum):
    """What a value depends on."""

    CONSTANT = 0
    WEIGHT = 1
    """On parameters only."""
    DATA = 2


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of an array."""

    shape: tuple[int, ...]
    kind: Kind = Kind.CONSTANT
    is_rows: bool = False
    """Data that are rows of a parameter, chosen by an index: still the parameter where another
    axis of it is contracted."""
    params: frozenset[int] = frozenset()
    """The parameters that a weight is made of."""
    features: list[dict[int, int]] = dataclasses.field(default_factory=list)
    """For each axis, the uses of parameters whose free axes it comes from, with the distance
    between neighbours when those free axes are counted through, the last one fastest."""
    apart: list[bool] = dataclasses.field(default_factory=list)
    """For each axis, whether its indices are to be told apart: it has features, or is put together
    from several arrays."""
    iota: int | None = None
    """The axis along which it counts 0, 1, 2, ..."""
    one_hot: int | None = None
    """The axis along which it is a one-hot vector."""
    product: tuple[Step, int, int] | None = None
    """The step and the two operands, if it is their element-wise product."""

    def __post_init__(self) -> None:
        self.features = [{} for _ in self.shape]
        self.apart = [False for _ in self.shape]

    @property
    def shape_apart(self) -> tuple[int, ...]:
        """The shape without the axes whose indices need not be told apart."""
        return tuple(n if apart else 1 for n, apart in zip(self.shape, self.apart, strict=True))

    def state(self) -> tuple[Any, ...]:
        """What only grows."""
        return self.kind, self.is_rows, self.params, sum(map(len, self.features)), sum(self.apart)

    @property
    def is_weight(self) -> bool:
        """Whether its groups are those of a parameter's blocks."""
        return self.kind == Kind.WEIGHT or self.is_rows


@dataclasses.dataclass
class Link:
    """Axes of an operand that, merged into one, are the axes of a result, merged into one."""

    operand: int
    axes: Axes
    result_axes: Axes
    result: int = 0
    positions: np.ndarray | None = None
    """For each index of the result's axis that of the operand's, negative where it has none."""
    parts: int = 1
    """The result has one of so many parts of the operand's axis, all with the same groups."""


@dataclasses.dataclass
class Relation:
    """What a rule says of a step."""

    links: list[Link] = dataclasses.field(default_factory=list)
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(operand, axis): a parameter has a block at each index of this axis."""
    couplings: list[tuple[int, Axes]] = dataclasses.field(default_factory=list)
    """(operand, axes): activations are coupled along these axes."""
    uses: dict[int, Axes] = dataclasses.field(default_factory=dict)
    """For each operand that is a parameter meeting data here, the axes of the result that come from
    its free axes, in its own order."""
    in_groups: bool = False
    """The outputs of a kernel are in groups that each have their own inputs."""
    kind: Kind | None = None
    is_rows: bool = False
    iota: int | None = None
    one_hot: int | None = None
    product: tuple[Step, int, int] | None = None
    unread: bool = False
    """Nothing is known of the primitive."""
    chain: tuple[tuple[int, Axes, Axes], ...] = ()
    """Of a product of weights: (operand, its contracted axes, the result's axes from it)."""


class Context:
    """What rules may ask for."""

    def __init__(self, values: list[Value]):
        self.values = values
        self.later: dict[int, Relation] = {}
        """Cuts and couplings of earlier steps, by their ids."""

    def inputs(self, step: Step) -> list[Value]:
        """The operands' values."""
        return [self.values[i] for i in step.inputs]

    def outputs(self, step: Step) -> list[Value]:
        """The results' values."""
        return [self.values[i] for i in step.outputs]


Rule = Callable[[Context, Step], Relation]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a rule into the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def same(operand: int, axes: Iterable[int], result: int = 0) -> list[Link]:
    """Links of axes that stay what they are."""
    return [Link(operand, (axis,), (axis,), result) for axis in axes]


# --- element-wise ---------------------------------------------------------------------------------

ADDITIVE = {"add", "sub", "add_any"}
MULTIPLICATIVE = {"mul", "div"}
ELEMENTWISE = {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "device_put", "digamma", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag",
    "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "logistic", "lt", "max",
    "mesh_cast", "min", "name", "ne", "neg", "nextafter", "not", "optimization_barrier", "or",
    "pcast", "polygamma", "population_count", "pow", "pvary", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "reshard", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "tan", "tanh", "xor", "zeta", "random_wrap", "random_unwrap",
    "layout_constraint", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "reduce_window",
    "reduce_window_max", "reduce_window_min", "reduce_window_sum", "merge",
    *ADDITIVE, *MULTIPLICATIVE,
}  # fmt: skip


def elementwise(context: Context, step: Step) -> Relation:
    """Axes of the result's size stay what they are.

    A parameter that meets data is a gain, one block, in a product; elsewhere it is a bias, and each
    coordinate is a block.
    """
    found = Relation()
    ins, out = context.inputs(step), context.outputs(step)[0]
    kinds = [value.kind for value in ins]
    found.kind = max(kinds)
    if step.name == "merge":
        found.kind = max(found.kind, out.kind)
    for operand, value in enumerate(ins):
        if len(value.shape) != len(out.shape):
            continue  # a scalar
        axes = [a for a, size in enumerate(value.shape) if size == out.shape[a] and size > 1]
        if value.is_weight and any(
            1 < size != n for size, n in zip(value.shape, out.shape, strict=True)
        ):
            found.unread = True  # pooled
        if value.kind == Kind.WEIGHT and found.kind == Kind.DATA:
            if step.name not in MULTIPLICATIVE:
                found.cuts += [(operand, axis) for axis in axes]
            found.uses[operand] = ()  # not followed: a bias makes no features
        else:
            found.links += same(operand, axes)
    varying = [value for value in ins if value.kind != Kind.CONSTANT]
    # What a loop carries may be rows at first, and something else in the next round.
    found.is_rows = step.name != "merge" and len(varying) == 1 and varying[0].is_rows
    if step.name == "eq":
        for counted, other in ((ins[0], ins[1]), (ins[1], ins[0])):
            axis = counted.iota
            if axis is not None and other.shape and not other.features[axis]:
                found.one_hot = axis
    elif len(ins) == 1:
        found.iota, found.one_hot = ins[0].iota, ins[0].one_hot
        found.product = ins[0].product if step.name in ("convert_element_type", "neg") else None
    if step.name == "mul":
        plain = [i for i, value in enumerate(ins) if value.kind == Kind.CONSTANT]
        if plain:
            found.product = ins[1 - plain[0]].product
        else:
            found.product = (step, 0, 1)
    return found


for _name in ELEMENTWISE:
    RULES[_name] = elementwise


# --- layout ---------------------------------------------------------------------------------------


def layout(context: Context, step: Step, links: list[Link], **more: Any) -> Relation:
    """Axes are moved about; nothing is used."""
    ins = context.inputs(step)
    return Relation(links, kind=max(value.kind for value in ins), is_rows=ins[0].is_rows, **more)


@rule("transpose")
def _transpose(context: Context, step: Step) -> Relation:
    order = step.params["permutation"]
    return layout(context, step, [Link(0, (a,), (i,)) for i, a in enumerate(order)])


@rule("broadcast_in_dim")
def _broadcast(context: Context, step: Step) -> Relation:
    (value, *_), out = context.inputs(step), context.outputs(step)[0]
    where = step.params["broadcast_dimensions"]
    links = [
        Link(0, (axis,), (to,))
        for axis, to in enumerate(where)
        if value.shape[axis] == out.shape[to] > 1
    ]
    iota = None if value.iota is None else where[value.iota]
    one_hot = None if value.one_hot is None else where[value.one_hot]
    return layout(context, step, links, iota=iota, one_hot=one_hot)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(context: Context, step: Step) -> Relation:
    value, out = context.inputs(step)[0], context.outputs(step)[0]
    links = [Link(0, *pair) for pair in reshaped(value.shape, out.shape)]
    flags = {}
    for name in ("iota", "one_hot"):
        axis = getattr(value, name)
        to = [link.result_axes for link in links if link.axes == (axis,)]
        flags[name] = to[0][0] if to and len(to[0]) == 1 else None
    return layout(context, step, links, **flags)


def reshaped(old: Sequence[int], new: Sequence[int]) -> list[tuple[Axes, Axes]]:
    """The smallest groups of axes that a reshape turns into one another, size 1 left out."""
    a = [i for i, size in enumerate(old) if size != 1]
    b = [i for i, size in enumerate(new) if size != 1]
    groups: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        i, j = i + 1, j + 1
        m, n = old[left[0]], new[right[0]]
        while m != n:
            if m < n and i < len(a):
                left.append(a[i])
                m, i = m * old[a[i]], i + 1
            elif j < len(b):
                right.append(b[j])
                n, j = n * new[b[j]], j + 1
            else:
                break
        groups.append((tuple(left), tuple(right)))
    return groups


@rule("slice")
def _slice(context: Context, step: Step) -> Relation:
    shape = context.inputs(step)[0].shape
    strides = step.params["strides"] or (1,) * len(shape)
    bounds = zip(step.params["start_indices"], step.params["limit_indices"], strides, strict=True)
    links = [
        Link(0, (axis,), (axis,), positions=None if (start, stop, by) == (0, shape[axis], 1)
             else np.arange(start, stop, by))
        for axis, (start, stop, by) in enumerate(bounds)
    ]  # fmt: skip
    return layout(context, step, links)


@rule("rev")
def _rev(context: Context, step: Step) -> Relation:
    shape = context.inputs(step)[0].shape
    turned = step.params["dimensions"]
    links = [
        Link(0, (a,), (a,), positions=np.arange(size)[::-1] if a in turned else None)
        for a, size in enumerate(shape)
    ]
    return layout(context, step, links)


@rule("pad")
def _pad(context: Context, step: Step) -> Relation:
    shape, out = context.inputs(step)[0].shape, context.outputs(step)[0].shape
    links = []
    for axis, (low, high, interior) in enumerate(step.params["padding_config"]):
        if (low, high, interior) == (0, 0, 0):
            links.append(Link(0, (axis,), (axis,)))
            continue
        positions = np.full(out[axis], -1)
        places = low + np.arange(shape[axis]) * (1 + interior)
        inside = (places >= 0) & (places < out[axis])
        positions[places[inside]] = np.arange(shape[axis])[inside]
        links.append(Link(0, (axis,), (axis,), positions=positions))
    return layout(context, step, links)


@rule("concatenate")
def _concatenate(context: Context, step: Step) -> Relation:
    ins, out = context.inputs(step), context.outputs(step)[0]
    along, start = step.params["dimension"], 0
    found = as_concatenated(context, step)
    for operand, value in enumerate(ins):
        size = value.shape[along]
        if operand not in found.uses:
            positions = np.full(out.shape[along], -1)
            positions[start : start + size] = np.arange(size)
            found.links += [
                Link(operand, (a,), (a,), positions=positions if a == along else None)
                for a in range(len(out.shape))
            ]
        start += size
    return found


@rule("stack")
def _stack(context: Context, step: Step) -> Relation:
    found = as_concatenated(context, step)
    along, count = step.params["axis"], len(step.inputs)
    for operand in range(count):
        if operand not in found.uses:
            rank = len(context.inputs(step)[operand].shape)
            found.links += [Link(operand, (a,), (a + (a >= along),)) for a in range(rank)]
            positions = np.where(np.arange(count) == operand, 0, -1)
            found.links.append(Link(operand, (), (along,), positions=positions))
    return found


def as_concatenated(context: Context, step: Step) -> Relation:
    """Arrays become parts of one. A parameter among data is used coordinate by coordinate."""
    ins = context.inputs(step)
    found = Relation(kind=max(value.kind for value in ins))
    for operand, value in enumerate(ins):
        if value.kind == Kind.WEIGHT and found.kind == Kind.DATA:
            found.cuts += [(operand, axis) for axis in range(len(value.shape))]
            found.uses[operand] = ()
    return found


@rule("split")
def _split(context: Context, step: Step) -> Relation:
    value = context.inputs(step)[0]
    along, start = step.params["axis"], 0
    links = []
    for result, size in enumerate(step.params["sizes"]):
        links += [
            Link(0, (a,), (a,), result, np.arange(start, start + size) if a == along else None)
            for a in range(len(value.shape))
        ]
        start += size
    return layout(context, step, links)


@rule("scan_slice")
def _scan_slice(context: Context, step: Step) -> Relation:
    """One layer of a stack that a loop runs over."""
    value = context.inputs(step)[0]
    found = layout(context, step, [Link(0, (a,), (a - 1,)) for a in range(1, len(value.shape))])
    if value.is_weight:
        found.cuts.append((0, 0))
    return found


@rule("scan_stack")
def _scan_stack(context: Context, step: Step) -> Relation:
    value = context.inputs(step)[0]
    return layout(context, step, [Link(0, (a,), (a + 1,)) for a in range(len(value.shape))])


# --- devices --------------------------------------------------------------------------------------


@rule("shard")
def _shard(context: Context, step: Step) -> Relation:
    """From the whole array to one device's part of it."""
    value, out = context.inputs(step)[0], context.outputs(step)[0]
    if value.kind != Kind.WEIGHT:
        return _moved_across(context, step)
    links = [
        Link(0, (axis,), (axis,), parts=size // max(out.shape[axis], 1))
        for axis, size in enumerate(value.shape)
    ]
    return layout(context, step, links)


@rule("unshard", "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all")
def _moved_across(context: Context, step: Step) -> Relation:
    """Axes that are split or joined across devices: unread where they are a parameter's."""
    value, out = context.inputs(step)[0], context.outputs(step)[0]
    axes = list(range(len(value.shape)))  # the operand's axis for each of the result's
    if not step.params.get("tiled", True):  # an axis for the devices goes or comes
        for gone in ("scatter_dimension", "split_axis"):
            if gone in step.params:
                axes.remove(step.params[gone])
        for new in ("all_gather_dimension", "concat_axis"):
            if new in step.params:
                axes.insert(step.params[new], -1)
    links = [
        Link(0, (axis,), (to,))
        for to, axis in enumerate(axes)
        if axis >= 0 and value.shape[axis] == out.shape[to]
    ]
    found = layout(context, step, links)
    kept = [link.axes[0] for link in links]
    found.unread = any(f for axis, f in enumerate(value.features) if axis not in kept)
    return found


@rule("psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast")
def _across(context: Context, step: Step) -> Relation:
    """Arrays of all devices combined, or exchanged, element by element."""
    return layout(context, step, [
        link for i, value in enumerate(context.inputs(step))
        for link in [Link(i, (a,), (a,), i) for a in range(len(value.shape))]
    ])  # fmt: skip


@rule("iota")
def _iota(context: Context, step: Step) -> Relation:
    return Relation(kind=Kind.CONSTANT, iota=step.params["dimension"])


# --- reductions -----------------------------------------------------------------------------------


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
      "reduce_xor", "argmax", "argmin", "reduce")  # fmt: skip
def _reduce(context: Context, step: Step) -> Relation:
    value = context.inputs(step)[0]
    gone = tuple(step.params.get("axes", step.params.get("dimensions", ())))
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    found = Relation(kind=value.kind)
    for result in range(len(step.outputs)):
        found.links += [Link(min(result, len(step.inputs) - 1), (a,), (i,), result)
                        for i, a in enumerate(kept)]  # fmt: skip
    if step.name == "reduce_sum" and value.product is not None:
        _sum_of_product(context, value.product, gone, kept)
    return found


def _sum_of_product(
    context: Context, product: tuple[Step, int, int], gone: Axes, kept: list[int]
) -> None:
    """A dot product that was written out: operands multiplied, then summed."""
    multiplied, *operands = product
    values = [context.inputs(multiplied)[operand] for operand in operands]
    if any(len(value.shape) != len(gone) + len(kept) for value in values):
        return
    has = [[bool(value.features[axis]) for axis in range(len(value.shape))] for value in values]
    shared = [axis for axis in kept if has[0][axis] and has[1][axis]]
    sides = [
        Side(value, gone, tuple(shared), tuple(a for a in kept if own[a] and a not in shared))
        for value, own in zip(values, has, strict=True)
    ]
    for side in sides:
        side.is_weight = side.value.kind == Kind.WEIGHT
    if not is_inner_product(*sides):
        return
    later = context.later.setdefault(id(multiplied), Relation())
    for operand, side in zip(operands, sides, strict=True):
        if side.is_weight:
            later.cuts += [(operand, axis) for axis in shared]
        else:
            later.couplings.append((operand, gone))


@rule("sort", "top_k", "approx_top_k")
def _sort(context: Context, step: Step) -> Relation:
    ins = context.inputs(step)
    along = step.params.get("dimension", step.params.get("reduction_dimension", -1))
    links = []
    for result in range(len(step.outputs)):
        rank = len(ins[0].shape)
        operand = min(result, len(ins) - 1)
        links += [link for link in same(operand, range(rank), result)
                  if link.axes[0] != along % rank]  # fmt: skip
    mixed = any(value.is_weight for value in ins)  # its coordinates are who knows where
    return Relation(links, kind=max(value.kind for value in ins), unread=mixed)


# --- contractions ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Side:
    """An operand of a contraction and the roles of its axes."""

    value: Value
    contracted: Axes
    batch: Axes
    free: Axes
    is_weight: bool = False
    """It is a parameter that meets data."""

    def featured(self, axes: Axes) -> list[dict[int, int]]:
        """The features of those axes that have any."""
        return [self.value.features[axis] for axis in axes if self.value.features[axis]]


def is_inner_product(a: Side, b: Side) -> bool:
    """Whether the contracted coordinates act through one number, and so are coupled.

    Then no features are left but those of heads. Where the other side keeps its own, the
    contraction is a layer whose weights happen to be computed.
    """
    if not a.featured(a.contracted) or not b.featured(b.contracted):
        return False
    if a.is_weight or b.is_weight:
        weight, data = (a, b) if a.is_weight else (b, a)
        # A layer without outputs of its own: one number for each head, as GAT's attention has.
        return not (data.is_weight or weight.free) and bool(data.featured(data.batch))
    if not (a.free or b.free) and a.featured(a.contracted) == b.featured(b.contracted):
        return False  # the norm of a vector, its entropy
    kept = [side for side in (a, b) if side.featured(side.free)]
    if len(kept) != 1:
        return not kept
    # One side keeps features: several heads share the other, if they are the slower axes of the
    # same parameter. (Were they the faster ones, blocks would be strided.)
    (side,) = kept
    return all(
        slow.keys() == fast.keys() and all(slow[use] > fast[use] for use in fast)
        for slow in side.featured(side.free)
        for fast in side.featured(side.contracted)
    )


@rule("dot_general")
def _dot_general(context: Context, step: Step) -> Relation:
    return _dot(context, step, step.params["dimension_numbers"])


@rule("ragged_dot_general")
def _ragged_dot(context: Context, step: Step) -> Relation:
    """Rows in groups of several lengths, each with its own matrix: the experts of a mixture."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    dims, groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    if not groups:  # the groups are parts of the contracted axis, as in a gradient
        return unknown(context, step)
    found = _dot(context, step, dims, groups)
    if context.inputs(step)[1].is_weight:
        found.cuts += [(1, axis) for axis in groups]
    return found


def _dot(context: Context, step: Step, dims: Any, groups: Axes = ()) -> Relation:
    """A dot of the first two operands; the result has no axis for `groups` of the second."""
    contracted, batch = dims
    sides = []
    for value, gone, shared, rest in zip(
        context.inputs(step)[:2], contracted, batch, ((), groups), strict=True
    ):
        free = tuple(a for a in range(len(value.shape)) if a not in (*gone, *shared, *rest))
        sides.append(Side(value, tuple(gone), tuple(shared), free))
    first = len(batch[0])
    places = [
        dict(zip((*s.batch, *s.free), (*range(first), *range(start, start + len(s.free))),
                 strict=True))
        for s, start in zip(sides, (first, first + len(sides[0].free)), strict=True)
    ]  # fmt: skip
    return contraction(context, step, sides, places)


def contraction(
    context: Context, step: Step, sides: list[Side], places: list[dict[int, int]]
) -> Relation:
    """A dot of two sides; `places` has the result's axis for each of their batch and free axes."""
    found = Relation(kind=max(side.value.kind for side in sides))
    for side, other in (sides, sides[::-1]):
        side.is_weight = side.value.kind == Kind.WEIGHT or (
            # Chosen rows are the parameter still where an axis of theirs is contracted with data.
            side.value.is_rows
            and not other.value.is_weight
            and bool(side.featured(side.contracted))
        )
    if all(side.is_weight for side in sides):
        found.chain = tuple(
            (operand, side.contracted, tuple(place[axis] for axis in side.free))
            for operand, (side, place) in enumerate(zip(sides, places, strict=True))
        )
    elif any(side.is_weight for side in sides):
        found.kind = Kind.DATA
    for operand, (side, place) in enumerate(zip(sides, places, strict=True)):
        if side.is_weight and not found.chain:
            other = sides[1 - operand]
            is_lookup = other.value.one_hot is not None and other.value.one_hot in other.contracted
            cut = (*side.contracted, *side.batch) if is_lookup else side.batch
            found.cuts += [(operand, axis) for axis in cut]
            found.uses[operand] = tuple(place[axis] for axis in side.free)
            found.is_rows |= is_lookup
        found.links += [Link(operand, (a,), (place[a],)) for a in (*side.batch, *side.free)]
    if is_inner_product(*sides):
        found.couplings += [
            (operand, side.contracted)
            for operand, side in enumerate(sides)
            if not side.value.is_weight
        ]
    return found


@rule("conv_general_dilated")
def _conv(context: Context, step: Step) -> Relation:
    numbers = step.params["dimension_numbers"]
    data, kernel = context.inputs(step)
    found = Relation(kind=Kind.DATA)
    batch, channels = numbers.lhs_spec[:2]
    out_batch, out_channels = numbers.out_spec[:2]
    outputs = numbers.rhs_spec[0]
    # A parameter as the image, or a kernel that is computed or chosen: nothing is known of these.
    found.unread = data.is_weight or (
        kernel.kind != Kind.WEIGHT and (kernel.is_rows or any(kernel.features))
    )
    found.links.append(Link(0, (batch,), (out_batch,)))
    groups = step.params["feature_group_count"]
    found.in_groups = groups * step.params["batch_group_count"] > 1
    if groups == data.shape[channels] == kernel.shape[outputs] > 1:  # depthwise: channels stay
        found.links.append(Link(0, (channels,), (out_channels,)))
    if kernel.kind == Kind.WEIGHT:
        found.links.append(Link(1, (outputs,), (out_channels,)))
        found.uses[1] = (out_channels,)
    return found


# --- indexing -------------------------------------------------------------------------------------


@rule("gather")
def _gather(context: Context, step: Step) -> Relation:
    value = context.inputs(step)[0]
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    paired = tuple(numbers.operand_batching_dims)
    inside = [
        a for a in range(len(value.shape)) if a not in (*numbers.collapsed_slice_dims, *paired)
    ]
    whole = {
        axis: place
        for axis, place in zip(inside, numbers.offset_dims, strict=True)
        if sizes[axis] == value.shape[axis]
    }
    return chosen(context, step, whole)


def chosen(context: Context, step: Step, whole: dict[int, int]) -> Relation:
    """Rows of the first operand by index.

    `whole` has the axes that are taken whole, and where they are in the result.
    """
    value = context.inputs(step)[0]
    found = Relation(kind=max(v.kind for v in context.inputs(step)))
    found.links = [Link(0, (axis,), (place,)) for axis, place in whole.items()]
    if value.kind == Kind.WEIGHT:
        rest = [axis for axis in range(len(value.shape)) if axis not in whole]
        found.cuts = [(0, axis) for axis in rest]
        found.uses[0] = tuple(whole.values())
        found.kind, found.is_rows = Kind.DATA, True
    else:
        found.is_rows = value.is_rows
    return found


@rule("dynamic_slice")
def _dynamic_slice(context: Context, step: Step) -> Relation:
    value, out = context.inputs(step)[0], context.outputs(step)[0]
    return chosen(
        context, step, {a: a for a, size in enumerate(value.shape) if size == out.shape[a]}
    )


@rule("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter_min",
      "scatter_max", "scatter-min", "scatter-max", "scatter_sub")  # fmt: skip
def _scatter(context: Context, step: Step) -> Relation:
    value, _, updates = context.inputs(step)
    numbers = step.params["dimension_numbers"]
    paired = tuple(numbers.operand_batching_dims)
    inside = [
        a for a in range(len(value.shape)) if a not in (*numbers.inserted_window_dims, *paired)
    ]
    window = {
        place: axis
        for axis, place in zip(inside, numbers.update_window_dims, strict=True)
        if updates.shape[place] == value.shape[axis]
    }
    return placed(context, step, 2, window)


@rule("dynamic_update_slice")
def _dynamic_update_slice(context: Context, step: Step) -> Relation:
    value, updates = context.inputs(step)[:2]
    window = {a: a for a, size in enumerate(updates.shape) if size == value.shape[a]}
    return placed(context, step, 1, window)


def placed(context: Context, step: Step, updates: int, window: dict[int, int]) -> Relation:
    """Parts of the first operand are replaced by, or added to, another operand.

    A parameter is used coordinate by coordinate in both places.
    """
    ins = context.inputs(step)
    found = Relation(kind=Kind.DATA)
    if all(value.kind == Kind.CONSTANT for value in ins):
        found.kind = Kind.CONSTANT
    links = {0: same(0, range(len(ins[0].shape))),
             updates: [Link(updates, (a,), (to,)) for a, to in window.items()]}  # fmt: skip
    for operand, own in links.items():
        if ins[operand].kind == Kind.WEIGHT:
            found.cuts += [(operand, axis) for axis in range(len(ins[operand].shape))]
            found.uses[operand] = ()
        else:
            found.links += own
    return found


def unknown(context: Context, step: Step) -> Relation:
    """No rule: harmless where neither parameters nor what they make come in."""
    ins = context.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    touched = any(value.is_weight or any(value.features) for value in ins)
    return Relation(kind=Kind.DATA if touched else kind, unread=touched)
