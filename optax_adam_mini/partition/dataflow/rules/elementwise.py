"""Element-wise primitives: axes of the result's size stay what they are.

A parameter that meets data is a gain, one block, in a product; elsewhere it is a bias, and each
coordinate is a block.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import RULES, same

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


def elementwise(facts: Facts, step: Step) -> Relation:
    """Axes of the result's size stay what they are.

    A parameter that meets data is a gain, one block, in a product; elsewhere it is a bias, and each
    coordinate is a block.
    """
    found = Relation()
    ins, out = facts.inputs(step), facts.outputs(step)[0]
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
