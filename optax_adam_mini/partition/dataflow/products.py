"""Splits the axes of a product before it is computed, and not before it is summed.

`(q * k).reshape(heads, -1).sum(-1)` contracts the features of each head. It is read as
`(q.reshape(heads, -1) * k.reshape(heads, -1)).sum(-1)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from optax_adam_mini.partition.dataflow.program import Program, Step, reshaped


def split_products(program: Program) -> None:
    """Reshapes the operands of products that are only reshaped and then summed."""
    readers: dict[int, list[Step]] = {}
    for step in program.steps:
        for place in step.inputs:
            readers.setdefault(place, []).append(step)
    products = {step.outputs[0]: step for step in program.steps if step.name == "mul"}
    steps: list[Step] = []
    for step in program.steps:
        product = products.get(step.inputs[0]) if step.name == "reshape" else None
        if product is None or not (
            len(readers[product.outputs[0]]) == 1
            and {reader.name for reader in readers.get(step.outputs[0], ())} == {"reduce_sum"}
        ):
            steps.append(step)
            continue
        before, after = (program.shapes[s.outputs[0]] for s in (product, step))
        shapes = [_split(program.shapes[i], before, after) for i in product.inputs]
        if None in shapes:
            steps.append(step)
            continue
        operands = [program.array(shape) for shape in shapes if shape is not None]
        steps += [
            dataclasses.replace(step, inputs=[place], outputs=[operand])
            for place, operand in zip(product.inputs, operands, strict=True)
        ]
        steps.append(dataclasses.replace(product, inputs=operands, outputs=step.outputs))
    program.steps = steps


def _split(
    shape: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> tuple[int, ...] | None:
    """The shape of an operand after the reshape; None if it varies along a part of merged axes."""
    if len(shape) != len(before):
        return None
    found = [1] * len(after)
    for old, new in reshaped(before, after):
        if all(shape[axis] == before[axis] for axis in old):
            for axis in new:
                found[axis] = after[axis]
        elif any(shape[axis] != 1 for axis in old):
            return None
    return tuple(found)
