"""Element-wise primitives: axes of the result's size keep their places.

A parameter that activations are multiplied by is a gain, which is one block. A parameter that meets
activations otherwise is a bias, and each coordinate is a block. If a parameter meets data that no
other parameter made, a later step decides what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from optax_adam_mini.partition.dataflow.axes import Indices
from optax_adam_mini.partition.dataflow.domain import (
    FUNCTIONS,
    Combines,
    Facts,
    Kind,
    Relation,
    Value,
)
from optax_adam_mini.partition.dataflow.program import (
    ADDING,
    LINEAR,
    MERGE,
    STOPPING,
    Step,
)
from optax_adam_mini.partition.dataflow.rules.registry import rule, same

MULTIPLICATIVE = {"mul", "div"}
ELEMENTWISE = {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "cos", "cosh", "digamma", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite",
    "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max", "min",
    "mulhi", "ne", "nextafter", "not", "one_minus_square", "or", "polygamma", "polynomial",
    "population_count", "pow", "random_gamma",
    "select_if_vmap", "nonbatchable", "nondifferentiable_backward",  # of Equinox's loops
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "xor", "zeta",
    "random_wrap", "random_unwrap", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum",
    "select_and_gather_add",
    *LINEAR,
}  # fmt: skip


@rule(*ELEMENTWISE)
def elementwise(facts: Facts, step: Step) -> Relation:
    """The rule of all element-wise primitives."""
    ins, out = facts.inputs(step), facts.outputs(step)[0]
    found = Relation(kind=max(value.kind for value in ins), keeps_dropped=True)
    for operand, value in enumerate(ins):
        if len(value.shape) == len(out.shape):
            found.links += same(
                operand, [a for a, size in enumerate(value.shape) if size == out.shape[a]]
            )
            if value.is_weight and any(  # pooled
                1 < size != out.shape[axis] and value.is_own(axis)
                for axis, size in enumerate(value.shape)
            ):
                found.unread.add(operand)
    if step.name == MERGE:
        return _merge(facts, step, found)
    if step.name in STOPPING and not (
        step.name == "stop_gradient" and ins[0].kind == Kind.WEIGHT  # a layer that is frozen
    ):
        # A target that the model itself computes is data for the loss.
        found.kind = Kind.DATA if found.kind else Kind.CONSTANT
        found.is_stopped = True
        return _with_one_hot(found, step, ins, out)
    if id(step) in facts.filters and not all(value.is_weight for value in ins):
        return _tap(found, ins)
    combine(facts, found, ins, is_product=step.name in MULTIPLICATIVE)
    is_square = step.inputs[:1] == step.inputs[1:] or all(value.made for value in ins)
    if step.name not in LINEAR or (step.name == "mul" and is_square):
        is_layer = any(value.is_combined for value in ins) and step.name in FUNCTIONS
        if is_layer or (found.kind != Kind.DATA and any(value.made for value in ins)):
            found.made = 2
    if step.name in ADDING and any(_is_kernel(value, out) for value in ins):
        found.made = 0  # a product that is added to a kernel (LoRA) makes another kernel
    if not _keeps_one_hot(facts, step, ins):
        found.ends |= Indices.ONE_HOT
    found.drops = step.name not in LINEAR
    if step.name not in LINEAR or sum(bool(v.shape) for v in ins) > 1:
        found.ends |= Indices.COUNTED
    if step.name == "mul" and len(ins[0].shape) == len(ins[1].shape):
        found.is_product = _is_new_product(ins, found)
    return found


def _is_kernel(value: Value, out: Value) -> bool:
    """Whether it is a parameter along all axes, and no product of parameters."""
    is_kernel = value.kind == Kind.WEIGHT and not value.made and value.shape == out.shape
    return is_kernel and all(value.is_own(axis) for axis, n in enumerate(out.shape) if n > 1)


def _tap(found: Relation, ins: Sequence[Value]) -> Relation:
    """One tap of a filter per channel."""
    for operand, value in enumerate(ins):
        if value.is_weight:
            found.uses[operand] = ()
            found.cuts += [(operand, a) for a in range(len(value.shape)) if value.is_own(a)]
    return found


def _with_one_hot(found: Relation, step: Step, ins: Sequence[Value], out: Value) -> Relation:
    """Marks the result as one-hot where a counter is compared with an index."""
    found.ends = Indices.COUNTED
    if step.name == "eq":
        for counted, other in ((ins[0], ins[1]), (ins[1], ins[0])):
            for axis in range(len(out.shape)):
                if (
                    counted.shape
                    and Indices.COUNTED in counted.whole(axis).indices
                    and not other.moves(axis)
                    and not any(
                        Indices.COUNTED in other.whole(a).indices for a in range(len(other.shape))
                    )
                ):
                    found.indices[axis] = Indices.ONE_HOT
    return found


def _keeps_one_hot(facts: Facts, step: Step, ins: Sequence[Value]) -> bool:
    """Whether one-hot vectors still choose rows, as if scaled, masked or smoothed by constants."""
    hot = [
        any(Indices.ONE_HOT in f.indices for factors in value.axes for f in factors)
        for value in ins
    ]
    if step.name not in LINEAR or not any(hot):
        return False
    if step.name in MULTIPLICATIVE or len(ins) == 1:
        return True
    cases = list(zip(ins, hot, step.inputs, strict=True))[step.name == "select_n" :]
    if step.name == "sub" and not hot[0]:
        return False
    is_smoothed = step.name in ("add", "add_any", "sub")
    return all(
        is_hot or place in facts.program.zeros or (is_smoothed and value.kind == Kind.CONSTANT)
        for value, is_hot, place in cases
    )


def _is_new_product(ins: Sequence[Value], found: Relation) -> bool:
    """Whether a sum over the product would contract the two operands.

    It would not if one operand only scales a product, or has nothing to contract. A parameter with
    axes of its own is a kernel there.
    """
    is_one = any(value.is_weight for value in ins) or all(value.has_features for value in ins)
    if any(value.kind == Kind.CONSTANT for value in ins) or not is_one:
        return False
    old = [any(factor.products for factors in value.axes for factor in factors) for value in ins]
    scales = [not v.has_features and not any(map(v.is_own, range(len(v.shape)))) for v in ins]
    return not any(old[i] and (scales[1 - i] or 1 - i in found.uses) for i in range(2))


def _merge(facts: Facts, step: Step, found: Relation) -> Relation:
    """A value that a loop carries or a branch returns.

    If the value is not a parameter in every iteration, a parameter in it is used per coordinate.
    """
    (value,), out = facts.inputs(step), facts.outputs(step)[0]
    found.made, found.is_summary, found.drops = value.made, value.is_summary, False
    if value.kind == Kind.DATA and not value.is_weight:
        found.is_plain = True
    if not value.is_weight:
        return found
    if not out.is_plain:
        found.keeps = {0}
    elif value.is_combined:
        found.spent = {0}
    else:
        found.cuts = [(0, axis) for axis in range(len(value.shape)) if value.is_own(axis)]
        found.uses[0] = ()
        found.kind = Kind.DATA
    return found


def combine(facts: Facts, found: Relation, ins: Sequence[Value], is_product: bool) -> None:
    """Adds what parameters do in an element-wise primitive; all operands have the same axes."""
    for operand, value in enumerate(ins):
        if not value.is_weight:
            continue
        others = [
            other
            for i, other in enumerate(ins)
            if i != operand
            and other.kind == Kind.DATA
            and (not is_product or not other.is_weight or facts.acts(other))
        ]
        own = [axis for axis, n in enumerate(value.shape) if n > 1 and value.is_own(axis)]
        if not others:
            found.keeps.add(operand)
            if (
                value.kind == Kind.WEIGHT
                and not is_product
                and _is_bias_of_a_parameter(ins, operand, own)
            ):
                found.cuts += [(operand, axis) for axis in own]
            continue
        if not own:  # a number: a temperature, a gate
            if is_product or not value.is_summary:  # adding a penalty is not a use
                found.uses[operand] = ()
            continue
        aligned = [other for other in others if len(other.shape) == len(value.shape)]
        covered = [
            axis
            for axis in own
            if any(facts.others_features(other, axis, value.params) for other in aligned)
        ]
        is_copied = any(
            other.moves(axis)
            for other in aligned
            for axis in range(len(value.shape))
            if axis not in own and not value.moves(axis)
        )
        scales = any(value.moves(axis) for axis in own)  # data were scaled by it, as by a gain
        frequencies = [
            axis
            for axis in range(len(value.shape))
            if (value.is_own(axis) or Indices.FREQUENCIES in value.whole(axis).indices)
            and any(Indices.FREQUENCIES in other.whole(axis).indices for other in aligned)
        ]
        if is_product:  # each member of an ensemble has its own gain
            found.cuts += [
                (operand, axis)
                for axis in own
                if any(Indices.MEMBERS in o.whole(axis).indices for o in aligned)
            ]
        if facts.is_rows(value):  # used where they were chosen; data may still scale them
            if not covered:
                found.keeps.add(operand)
        elif is_product and frequencies:  # a convolution of each channel
            found.uses[operand] = ()
            found.cuts += [(operand, axis) for axis in own if axis not in frequencies]
        elif is_product and is_copied and len(covered) == len(own):
            found.uses[operand] = ()
        elif not is_product and covered and not (facts.acts(value) and scales):
            found.uses[operand] = ()  # not followed: a bias makes no features
            found.cuts += [(operand, axis) for axis in own]
        else:
            found.keeps.add(operand)
            if is_product and any(other.moves(axis) for other in aligned for axis in own):
                found.combines[operand] = Combines.GAIN
            elif not facts.acts(value):
                found.combines[operand] = Combines.SCALED if is_product else Combines.SHIFT
    weights = [value for value in ins if value.is_weight]
    found.is_summary = bool(weights) and all(value.is_summary for value in weights)


def _is_bias_of_a_parameter(ins: Sequence[Value], operand: int, own: Sequence[int]) -> bool:
    """Whether a parameter is added at each index of another's axis: the sum acts as data."""
    value = ins[operand]
    return bool(own) and any(
        other.kind == Kind.WEIGHT
        and not other.params & value.params
        and any(
            other.is_own(axis) and axis not in own and other.shape[axis] > 1
            for axis in range(len(value.shape))
        )
        for other in ins
        if len(other.shape) == len(value.shape)
    )
