"""Inner products: contractions whose coordinates act through one number, and so are coupled.

Attention scores and similarities of two embeddings are inner products. A mixture of values or of
experts is not: it is a layer whose weights are computed, and keeps the features of one side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from optax_adam_mini.partition.dataflow.axes import Part
from optax_adam_mini.partition.dataflow.domain import Axes, Facts, Kind, Value
from optax_adam_mini.partition.dataflow.program import Step


@dataclasses.dataclass
class Side:
    """An operand of a contraction, and the roles of its axes."""

    value: Value
    contracted: Axes
    batch: Axes
    free: Axes
    is_kernel: bool = False
    """It is a parameter that meets data here."""
    is_written_out: bool = False
    """The contraction is written as a product and a sum: only the other side varies along an axis
    of size 1."""

    def uses(self, axes: Axes) -> set[int]:
        """The uses that made these axes."""
        return {use for axis in axes for use in self.value.features(axis)}

    def featured(self, axes: Axes) -> list[int]:
        """Those of the axes that have features, or are the kernel's own."""
        return [
            axis
            for axis in axes
            if self.value.features(axis) or (self.is_kernel and self.value.is_own(axis))
        ]

    @property
    def is_contracted(self) -> bool:
        """Whether a parameter's axis is contracted, and not only one it was repeated along."""
        value = self.value
        return bool(self.contracted) and any(
            (value.shape[axis] == 1 and not self.is_written_out)
            or (value.shape[axis] > 1 and value.is_own(axis))
            for axis in self.contracted
        )

    def has_outputs(self, facts: Facts) -> bool:
        """Whether a free axis is the parameter's, and not one of activations combined with it."""
        value = self.value
        is_activation = facts.is_activation(value, range(len(value.shape)))
        return any(
            value.shape[axis] > 1
            and value.is_own(axis)
            and not (is_activation and value.moves(axis))
            for axis in self.free
        )

    def is_layer(self, facts: Facts) -> bool:
        """Whether it is the output of a layer: functions of a parameter combined with data.

        A kernel that is computed for each example has outputs of its own.
        """
        value = self.value
        is_function = value.is_combined and value.made == 2 and not facts.is_rows(value)
        return is_function and not any(value.is_own(axis) for axis in self.free)


def is_inner_product(facts: Facts, step: Step, a: Side, b: Side) -> bool:
    """Whether the contracted coordinates act through one number, and so are coupled.

    An inner product leaves no features but those of heads and of positions. If one side keeps
    others, the contraction is a layer whose weights are computed. If the losses are a mere sum of
    its results, as of a Gaussian's likelihood, they have a term for each coordinate, and none is
    coupled.

    Args:
        facts: what is known.
        step: the contraction.
        a: its first operand.
        b: its second operand.
    """
    return _leaves_no_features(facts, step, a, b) and not facts.is_summed_into_losses(
        step.outputs[0]
    )


def _leaves_no_features(facts: Facts, step: Step, a: Side, b: Side) -> bool:
    """Whether the results have no features but those of heads and of positions."""
    # A sum over examples or positions as well is a mean of many products.
    summed = [axis for axis in range(len(a.contracted)) if a.value.shape[a.contracted[axis]] > 1]
    for side in (a, b):
        if not summed or len(side.featured(tuple(side.contracted[i] for i in summed))) < len(
            summed
        ):
            return False
    if a.is_kernel or b.is_kernel:
        kernel, data = (a, b) if a.is_kernel else (b, a)
        place = step.inputs[1 if a.is_kernel else 0]
        # Either a linear layer without outputs, one number per head, as in GAT's attention; or
        # queries computed from parameters alone, whose scores weight values.
        has_outputs = any(
            kernel.value.is_own(axis) or kernel.value.shape[axis] == 1 for axis in kernel.free
        )
        return (
            not data.is_kernel
            and (not has_outputs or (kernel.value.made > 0 and kernel.value.kind == Kind.WEIGHT))
            and any(
                fast.keys() & slow.keys() and _are_slower(slow, fast)
                for slow in map(data.value.features, data.batch)
                for fast in map(data.value.features, data.contracted)
            )
            and (
                facts.weights_others(step.outputs[0])
                if has_outputs
                else facts.is_linear(place, data.uses(data.contracted))
            )
        )
    if _meet(a, b):
        # Both sides share outputs: the norm of a vector, positions matched with themselves, the
        # derivative of a mixture. These couple nothing. If each side also has its own uses, the
        # shared outputs are only a factor of both, and the check below decides.
        if a.featured(a.free) or b.featured(b.free) or a.value.mixtures != b.value.mixtures:
            return False
        left, right = a.uses(a.contracted), b.uses(b.contracted)
        if left == right and not (a.free or b.free):
            return False
        if left < right or right < left:
            return False
    kept = [(side, side.featured(side.free)) for side in (a, b)]
    shared = a.uses(a.free) & b.uses(b.free)
    are_two = all(axes for _, axes in kept)
    kept = [
        (
            side,
            [
                axis
                for axis in axes
                if not (side.value.features(axis).keys() <= shared)  # the same positions on both
                and not _is_position(facts, side, axis, are_two)
            ],
        )
        for side, axes in kept
    ]
    kept = [(side, axes) for side, axes in kept if axes]
    if len(kept) != 1:
        return not kept
    # One side keeps features. They are heads that share the other side if they are the slower axes
    # of the same parameter. (If they were the faster axes, blocks would be strided.)
    # Without positions on both sides, it is a layer whose kernel is computed.
    ((side, axes),) = kept
    has_positions = all(
        any(one.value.shape[axis] > 1 and not (one is side and axis in axes) for axis in one.free)
        for one in (a, b)
    )
    return has_positions and all(
        slow.keys() == fast.keys() and _are_slower(slow, fast)
        for slow in map(side.value.features, axes)
        for fast in map(side.value.features, side.featured(side.contracted))
    )


def _are_slower(slow: Mapping[int, Part], fast: Mapping[int, Part]) -> bool:
    """Whether an axis is slower than another in every use that made both."""
    return all(slow[use].distance > fast[use].distance for use in slow.keys() & fast.keys())


def _meet(a: Side, b: Side) -> bool:
    """Whether the same outputs are contracted on both sides."""
    return any(
        all(
            start < last and first < stop
            for distance, (start, stop) in _extents(a.value, use).items()
            for first, last in [_extents(b.value, use).get(distance, (start, stop))]
        )
        for use in a.uses(a.contracted) & b.uses(b.contracted)
    )


def _extents(value: Value, use: int) -> dict[int, tuple[int, int]]:
    """For each distance of neighbours, the start and stop of the outputs of a use."""
    factors = [*map(value.whole, range(len(value.shape))), *value.dropped]
    parts = sorted(factor.features[use] for factor in factors if use in factor.features)
    return {part.distance: (part.start, part.stop) for part in parts}


def _is_position(facts: Facts, side: Side, axis: int, are_two: bool) -> bool:
    """Whether an axis with features holds positions, as seen from the contracted axes.

    It does if the layer that made the contracted axes ran over it, as a query's kernel runs over
    mixed positions, and either both sides keep features or that layer contracted features. It also
    does if the layer that made it ran over the contracted features, to mix positions (the keys of
    Linformer).
    """
    contracted = [(use, facts.uses[use]) for use in side.uses(side.contracted)]
    found = side.value.whole(axis)
    if all(
        found.over >> number & 1
        and (
            are_two or (use.of_features and not any(use.ran_over >> f & 1 for f in found.features))
        )
        for number, use in contracted
    ):
        return True
    return all(
        facts.uses[made].ran_over >> number & 1
        for made in found.features
        for number, _ in contracted
    )
