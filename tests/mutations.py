"""Small faults, and for each a test that catches it: `tests/test_mutations.py` puts them in.

python -m tests.mutations                 # every fault, with what became of it
python -m tests.mutations "wrong axis"    # these alone
"""

import multiprocessing
import pathlib
import shutil
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "optax_adam_mini"
DATAFLOW = "partition/dataflow/"


class Fault(NamedTuple):
    """What stands in a file of the package, what is put there, and who sees it."""

    file: str
    old: str
    new: str
    caught_by: str
    """A test, as `file::name` from the folder of tests."""


FAULTS = {
    "frozen models lose their parts": Fault(
        DATAFLOW + "interpret.py",
        "[of_all if frozen else found for frozen in is_frozen]",
        "[found for frozen in is_frozen]",
        "partition/dataflow/test_layers.py::test_a_frozen_model_is_cut_like_a_trained_one",
    ),
    "decay rates in 16 bits": Fault(
        "transform.py",
        "b1, b2, eps, eps_root = map(widened, (b1, b2, eps, eps_root))",
        "pass",
        "test_hyperparams.py::test_decay_rates_in_16_bits_are_computed_with_in_float32",
    ),
    "only functions of one operand are functions": Fault(
        DATAFLOW + "rules/elementwise.py",
        "if step.name not in LINEAR or (step",
        "if (step.name not in LINEAR and len(ins) == 1) or (step",
        "partition/dataflow/test_layers.py::test_a_function_of_parameters_makes_a_layer_of_them[relu]",
    ),
    "a mask hides a Toeplitz matrix": Fault(
        DATAFLOW + "members.py",
        "not in _MOVES | LINEAR | FUNCTIONS",
        "not in _MOVES",
        "partition/dataflow/test_layers.py::test_a_toeplitz_matrix_is_cut_per_coordinate_whatever_is_done_to_it[masked]",
    ),
    "rows that meet activations are inputs": Fault(
        DATAFLOW + "rows.py",
        "if len(inputs) in (0, len(rest)):",
        "if not inputs:",
        "partition/dataflow/test_layers.py::test_a_table_whose_rows_are_dotted_with_activations_has_rows_and_columns",
    ),
    "heads go on through what is stopped": Fault(
        DATAFLOW + "matrices.py",
        "(relation.is_stopped and result",
        "(False and result",
        "partition/dataflow/test_layers.py::test_an_output_head_stays_one_if_its_logits_go_on_without_a_gradient[stopped]",
    ),
    "heads with kernels of their own have no kernel": Fault(
        DATAFLOW + "matrices.py",
        "set[Role]() if is_chosen or is_grouped else {Role.OUTPUT, Role.BATCH}",
        "set[Role]()",
        "partition/dataflow/test_layers.py::test_a_kernel_whose_heads_are_read_by_kernels_of_their_own_is_a_matrix",
    ),
    "grouped convolutions are matrices": Fault(
        DATAFLOW + "matrices.py",
        "is_chosen or is_grouped else",
        "is_chosen else",
        "partition/dataflow/test_layers.py::test_a_grouped_convolution_is_no_matrix",
    ),
    "sum for mean": Fault(
        "sums.py",
        "return total / np.asarray(sizes, total.dtype)",
        "return total",
        "test_transform.py::test_updates_on_any_grid_equal_the_papers_formulas",
    ),
    "mean of the first block's size": Fault(
        "sums.py",
        "return total / np.asarray(sizes, total.dtype)",
        "return total / np.ravel(sizes)[:1].sum()",
        "test_transform.py::test_updates_on_any_grid_equal_the_papers_formulas",
    ),
    "wrong axis": Fault(
        "sums.py",
        "sum(axis + 2))",
        "sum(axis + 1))",
        "test_transform.py::test_updates_on_any_grid_equal_the_papers_formulas",
    ),
    "blocks repeated in turn": Fault(
        "sums.py",
        "jnp.repeat(part, size, axis=axis + 1)",
        "jnp.concatenate([part] * size, axis + 1)",
        "test_sums.py::test_block_mean_and_spread_equal_numpy",
    ),
    "squares in the gradient's dtype": Fault(
        "sums.py",
        "wide(of(wide(x))) if of else wide(x)",
        "wide(of(x)) if of else wide(x)",
        "test_transform.py::test_updates_on_any_grid_equal_the_papers_formulas",
    ),
    "mean in bfloat16": Fault(
        "sums.py",
        "wide(of(wide(x))) if of else wide(x)",
        "wide((of or (lambda x: x))(x.astype(jnp.bfloat16)))",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "a long row left out": Fault(
        "sums_on_cpu.py",
        "fori_loop(0, steps, add",
        "fori_loop(1, steps, add",
        "test_sums.py::test_sums_over_a_long_axis_equal_numpy[shape0-spec0-float32]",
    ),
    "no bias correction of nu": Fault(
        "transform.py",
        "v / t.c2",
        "v",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "no bias correction of mu": Fault(
        "transform.py",
        "mu_weight, g_weight = 1 / c1, 0.0",
        "mu_weight, g_weight = 1.0, 0.0",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "b1 for b2": Fault(
        "transform.py",
        "t.b2 * v + t.b2_rest * s",
        "t.b1 * v + t.b1_rest * s",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "eps inside the root": Fault(
        "transform.py",
        "(jnp.sqrt(v / t.c2 + t.eps_root) + t.eps)",
        "jnp.sqrt(v / t.c2 + t.eps_root + t.eps)",
        "test_transform.py::test_per_element_is_adamw[{'b1': 0.0, 'b2': 0.0}]",
    ),
    "eps_root outside the root": Fault(
        "transform.py",
        "(jnp.sqrt(v / t.c2 + t.eps_root) + t.eps)",
        "(jnp.sqrt(v / t.c2) + t.eps_root + t.eps)",
        "test_transform.py::test_per_element_is_adamw[{'eps_root': 0.0001}]",
    ),
    "decay not scaled by the learning rate": Fault(
        "transform.py",
        """            add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),""",
        """            optax.scale_by_learning_rate(learning_rate),
            add_decayed_weights(weight_decay, mask),""",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "nesterov looks back": Fault(
        "transform.py",
        "b1 / c1_next, (1 - b1) / c1",
        "b1 / c1, (1 - b1) / c1",
        "test_transform.py::test_per_element_is_adamw[{'nesterov': True}]",
    ),
    "count not advanced": Fault(
        "transform.py",
        "return in_tree(0), ScaleByAdamMiniState(count,",
        "return in_tree(0), ScaleByAdamMiniState(state.count,",
        "test_transform.py::test_per_element_is_adamw[{}]",
    ),
    "complex square without conjugate": Fault(
        "transform.py",
        "jnp.real(x * jnp.conj(x))",
        "jnp.real(x * x)",
        "test_optax_wrappers.py::test_complex_parameters_have_the_right_rows_and_columns",
    ),
    "integers decay": Fault(
        "transform.py",
        "d if u is not None and _is_inexact(p) else u",
        "d if u is not None else u",
        "test_optax_wrappers.py::test_integer_leaves_are_left_alone[default]",
    ),
    "a row times a column, not over their mean": Fault(
        "product.py",
        "ratio = _ratio(nu[1], v_ab)",
        "ratio = nu[1]",
        "test_product.py::test_v_is_the_product_of_a_row_and_a_column",
    ),
    "one row that overflows stops all": Fault(
        "product.py",
        "jnp.where(finite, x, 0.0)",
        "x",
        "test_product.py::test_overflow_and_nan_stop_only_their_row_and_column[None-nan]",
    ),
    "blocks of unequal sizes weigh alike": Fault(
        "product.py",
        "weights: Any = 1.0 if isinstance(sizes, float) else sizes / np.max(sizes, initial=1)",
        "weights: Any = 1.0",
        "test_product.py::test_rows_of_unequal_sizes_weigh_by_their_size",
    ),
    "codes are cut off": Fault(
        "quantized.py",
        "(code + (random_bits(_CUT, m.shape, seed) - extra)) >> _CUT",
        "(code - extra) >> _CUT",
        "test_quantized.py::test_codes_of_version_0_3_are_read",
    ),
    "small numbers are lost": Fault(
        "quantized.py",
        ".astype(jnp.float32) + _OFFSET",
        ".astype(jnp.float32)",
        "test_quantized.py::test_every_code_is_read_and_written_as_itself",
    ),
    "a factor of 1.01 in the sums on CPU": Fault(
        "sums_on_cpu.py",
        "plain = lambda x: jnp.sum(value(x), axis=tuple(whole), keepdims=True)",
        "plain = lambda x: 1.01 * jnp.sum(value(x), axis=tuple(whole), keepdims=True)",
        "test_sums.py::test_sums_of_bfloat16_are_in_float32",
    ),
    "a factor of 1.01 in long rows": Fault(
        "sums_on_cpu.py",
        "return jnp.sum(total, axis=tuple(whole), keepdims=True)",
        "return 1.01 * jnp.sum(total, axis=tuple(whole), keepdims=True)",
        "test_sums.py::test_sums_over_a_long_axis_equal_numpy[shape5-spec5-float32]",
    ),
    "the plain form of the bias correction": Fault(
        "transform.py",
        "-jnp.expm1(count * _log(decay))",
        "1 - jnp.exp(count * _log(decay))",
        "test_transform.py::test_bias_corrections_have_all_digits",
    ),
    "the count wraps": Fault(
        "transform.py",
        "jnp.asarray(optax.safe_increment(state.count))",
        "state.count + 1",
        "test_transform.py::test_the_step_count_does_not_overflow",
    ),
    "two parameters share a seed": Fault(
        "transform.py",
        "[salt_of(path_of(keys)) for",
        "[salt_of(()) for",
        "test_quantized.py::test_two_parameters_never_share_random_numbers[one tree]",
    ),
    "steps are not held": Fault(
        "transform.py",
        "return jnp.clip(update, -longest, longest)",
        "return update",
        "test_bounded_step.py::test_no_step_is_longer_than_adams",
    ),
    "the same random numbers at every step": Fault(
        "random_bits.py",
        "mixed(place + seed)",
        "mixed(place)",
        "test_rounding.py::test_the_mean_of_many_roundings_is_the_sum",
    ),
    "bits of the step left out": Fault(
        "random_bits.py",
        "mixed(mixed(jnp.asarray(count, jnp.uint32)) +",
        "mixed(",
        "test_rounding.py::test_the_mean_of_many_roundings_is_the_sum",
    ),
    "the same random numbers in every parameter": Fault(
        "random_bits.py",
        " + jnp.asarray(salt, jnp.uint32))",
        ")",
        "test_rounding.py::test_random_numbers_of_roundings_are_uncorrelated",
    ),
    "the numbers of the moment of a parameter": Fault(
        "rounding.py",
        '(path_of(keys), "params")',
        "path_of(keys)",
        "test_rounding.py::test_random_numbers_of_roundings_are_uncorrelated",
    ),
    "parameters rounded toward zero": Fault(
        "random_bits.py",
        "bits + random_bits(16, x.shape, seed).astype(jnp.uint32)",
        "bits",
        "test_rounding.py::test_a_parameter_is_rounded_up_and_down_on_either_side_of_zero",
    ),
    "half of the random bits": Fault(
        "random_bits.py",
        "random_bits(16,",
        "random_bits(15,",
        "test_rounding.py::test_a_parameter_is_rounded_up_and_down_on_either_side_of_zero",
    ),
    "float32 parameters rounded": Fault(
        "rounding.py",
        "if u is None or not _is_bfloat16(p):",
        "if u is None or not jnp.issubdtype(p.dtype, jnp.floating):",
        "test_rounding.py::test_a_step_is_the_float32_step_of_the_inner_optimizer_rounded[adamw-bfloat16]",
    ),
    "a difference in bfloat16": Fault(
        "rounding.py",
        "-0.0, new - old)",
        "-0.0, (new - old).astype(jnp.bfloat16))",
        "test_rounding.py::test_a_parameter_is_rounded_to_a_neighbour_of_the_sum[float32-True]",
    ),
    "gradients not widened": Fault(
        "rounding.py",
        "            _widened(updates), state",
        "            updates, state",
        "test_rounding.py::test_a_step_is_the_float32_step_of_the_inner_optimizer_rounded[adamw-bfloat16]",
    ),
    "state of parameters in bfloat16": Fault(
        "rounding.py",
        "inner.init(_widened(params))",
        "inner.init(params)",
        "test_rounding.py::test_weight_decay_of_a_thousandth_of_a_unit_adds_up[adamw]",
    ),
    "beyond the largest number to infinity": Fault(
        "random_bits.py",
        "rounded, nearest)",
        "rounded, x)",
        "test_rounding.py::test_infinity_and_nan_pass_and_rounding_makes_no_others",
    ),
    "rounded parameters have a derivative": Fault(
        "random_bits.py",
        """    x = without_derivative(x, "update parameters in float32, without stochastic_rounding")
""",
        "",
        "test_rounding.py::test_rounded_parameters_have_no_derivative",
    ),
    "states share the coefficients": Fault(
        "momentum.py",
        "else np.asarray(given)",
        "else jnp.asarray(given)",
        "test_muon.py::test_a_donated_state_leaves_others_their_coefficients[ns_coeffs1]",
    ),
    "the old bound for the new moment": Fault(
        "transform.py",
        "kept = write(mu, new, dtype,",
        "kept = write(mu, old, dtype,",
        "test_optax_wrappers.py::test_wrapped_adam_mini_in_8_bits_is_close_to_one_written_by_hand[mean-partition_two_rates]",
    ),
    "a value is used by its last use": Fault(
        DATAFLOW + "backward.py",
        "self.acts[place] = self.groups.both(self.acts[place], found)",
        "self.acts[place] = found if not are_all(found, UNSEEN) else self.acts[place]",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[rotations-pairs-mean]",
    ),
    "what is alone somewhere is coupled": Fault(
        DATAFLOW + "groups.py",
        """        if ALONE in found:
            return ALONE
        found.discard(UNSEEN)""",
        "        found -= {ALONE, UNSEEN}",
        "partition/dataflow/test_forms.py::test_a_value_with_several_uses_is_cut_for_all_of_them[one copy of it is read]",
    ),
    "a join for a meet": Fault(
        DATAFLOW + "groups.py",
        """if are_all(a, ALONE) or are_all(b, UNSEEN):
            return a""",
        """if are_all(a, UNSEEN) or are_all(b, ALONE):
            return b if are_all(a, UNSEEN) else a""",
        "partition/dataflow/test_forms.py::test_a_value_with_several_uses_is_cut_for_all_of_them[read before its score]",
    ),
    "the norm of all heads joins them": Fault(
        DATAFLOW + "groups.py",
        'self.named(("through", id(step), group)) if group in self._members else group',
        "group",
        "partition/dataflow/test_forms.py::test_a_value_with_several_uses_is_cut_for_all_of_them[with the norm of all heads]",
    ),
    "what is contracted is passed on": Fault(
        DATAFLOW + "backward.py",
        "if gone and not (is_sum or is_taken):",
        "if False:",
        "partition/dataflow/test_infer.py::test_a_model_has_the_blocks_derived_by_hand[latent attention, turned]",
    ),
    "a comparison is a use": Fault(
        DATAFLOW + "backward.py",
        "if id(step) not in self._products and not relation.is_stopped:",
        "if id(step) not in self._products:",
        "partition/dataflow/test_forms.py::test_a_value_with_several_uses_is_cut_for_all_of_them[compared]",
    ),
    "a product acts by itself and by its sum": Fault(
        DATAFLOW + "backward.py",
        "if any(product.couplings for product in sums):",
        "if False:",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[scores-sum of a product-mean]",
    ),
    "an axis of the outputs is forgotten": Fault(
        DATAFLOW + "backward.py",
        """                found = self.groups.united(found, axis)
        found = found.transpose""",
        """                found = found.take([0], axis)
        found = found.transpose""",
        "partition/dataflow/test_forms.py::test_a_value_with_several_uses_is_cut_for_all_of_them[one copy of it is read]",
    ),
    "positions off by one": Fault(
        DATAFLOW + "groups.py",
        "found[(*at, once[taken])] = grid",
        "found[(*at, once[taken] - 1)] = grid",
        "partition/dataflow/test_forms.py::test_stacked_layers_have_rows_of_their_own",
    ),
    "one head for all of them": Fault(
        DATAFLOW + "backward.py",
        "apart = [1 if axis in axes else size for axis, size in enumerate(shape)]",
        "apart = [1 for axis, size in enumerate(shape)]",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[scores-sum of a product-mean]",
    ),
    "the finer cut of a parameter loses": Fault(
        DATAFLOW + "groups.py",
        """if a is None or b is None:
            return None""",
        """if a is None or b is None:
            return b if a is None else a""",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[layers-by index-mean]",
    ),
    "layers that are indexed are outputs": Fault(
        DATAFLOW + "roles.py",
        "found = {Role.REDUCTION if id(step) in facts.taps else Role.BATCH}",
        "pass",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[layers-by index-outer]",
    ),
    "members are outputs": Fault(
        DATAFLOW + "roles.py",
        "if axis in members:",
        "if False:",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[members-vmap-outer]",
    ),
    "layers along the inputs are one": Fault(
        DATAFLOW + "backward.py",
        "if isinstance(label, int) and label == WHOLE and len(link.positions) < size:",
        "if False:",
        "partition/dataflow/test_forms.py::test_layers_side_by_side_in_one_kernel_have_blocks_of_their_own",
    ),
    "layers along the inputs share their columns": Fault(
        DATAFLOW + "rows.py",
        "if a in inputs and is_contracted(a)]",
        "if False]",
        "partition/dataflow/test_forms.py::test_layers_side_by_side_in_one_kernel_have_blocks_of_their_own",
    ),
    "a kernel that is taken apart has no parts": Fault(
        DATAFLOW + "rows.py",
        "if (index, own) in factor.own]",
        "if False]",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[gates-kernels-outer]",
    ),
    "a factor of each member is one": Fault(
        DATAFLOW + "rules/contractions.py",
        "if value.is_own(axis) and other.value.is_own(met)",
        "if False",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[members with gains-vmap-mean]",
    ),
    "members beside their outputs are members": Fault(
        DATAFLOW + "roles.py",
        "found.add(Role.OUTPUT)  # members",
        "pass  # members",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[kernels of each head-slices-outer]",
    ),
    "a product that a kernel spreads is a score": Fault(
        DATAFLOW + "rules/reductions.py",
        "or is_spread:",
        ":",
        "partition/dataflow/test_forms.py::test_a_sum_of_gated_outputs_is_a_layer_and_joins_no_neurons",
    ),
    "a kernel that scales a product is a gain": Fault(
        DATAFLOW + "rules/elementwise.py",
        "not any(map(v.is_own, range(len(v.shape))))",
        "True",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[states-sum of a product-mean]",
    ),
    "fast axes of members are heads": Fault(
        DATAFLOW + "rules/inner_products.py",
        "fast.keys() & slow.keys() and _are_slower(slow, fast)",
        "fast.keys() & slow.keys()",
        "partition/dataflow/test_forms.py::test_outputs_of_members_that_are_summed_with_weights_are_not_joined[negative]",
    ),
    "a reshaped kernel has the borders of a small one": Fault(
        DATAFLOW + "rows.py",
        "many *= math.prod(",
        "math.prod(",
        "partition/dataflow/test_forms.py::test_a_reshaped_kernel_has_a_row_for_each_index_that_is_taken",
    ),
    "a known index is any index": Fault(
        DATAFLOW + "inline.py",
        "taken = _taken(program, name, params, operands)",
        "taken = []",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[gates-taken from the kernel-outer]",
    ),
    "a value that is written over is lost": Fault(
        DATAFLOW + "rules/indexing.py",
        "if len(places) == 1 and",
        "if False and",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[rotations-written-mean]",
    ),
    "branches of a scan are a filter": Fault(
        DATAFLOW + "taps.py",
        "[*product.step.outputs, *layers]",
        "product.step.outputs",
        "partition/dataflow/test_forms.py::test_gains_of_branches_that_are_added_are_not_read_as_a_filter",
    ),
    "a filter of frequencies is a gain": Fault(
        DATAFLOW + "rules/elementwise.py",
        "if (value.is_own(axis) or Indices.FREQUENCIES in value.whole(axis).indices)",
        "if Indices.FREQUENCIES in value.whole(axis).indices",
        "partition/dataflow/test_forms.py::test_a_filter_of_frequencies_has_a_block_for_each_channel",
    ),
    "of copies the first one counts": Fault(
        DATAFLOW + "groups.py",
        "for i in range(copy.max(initial=0) + 1)]",
        "for i in range(1)]",
        "partition/dataflow/test_forms.py::test_an_output_in_two_heads_is_a_block_of_its_own",
    ),
    "a kernel with repeated rows is a table": Fault(
        DATAFLOW + "members.py",
        "found.add(id(rows[place]))",
        "pass",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[repeats-an index-mean]",
    ),
    "a kernel with unknown copies is a table": Fault(
        DATAFLOW + "rules/indexing.py",
        "if id(step) in facts.repeats:",
        "if False:",
        "partition/dataflow/test_forms.py::test_the_channels_of_a_toeplitz_matrix_are_never_joined",
    ),
    "halves of a row are one block": Fault(
        DATAFLOW + "backward.py",
        "self._refine(place, dict.fromkeys(own, WHOLE))",
        "pass",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[halves of a table-rows, then a split-mean]",
    ),
    "gains of two axes have rows": Fault(
        DATAFLOW + "rows.py",
        "if not outputs and len(inputs) > 1 and are_outputs:",
        "if not outputs and len(inputs) > 1:",
        "partition/dataflow/test_forms.py::test_gains_of_heads_have_no_rows",
    ),
    "a rotation makes parts": Fault(
        DATAFLOW + "rows.py",
        "if where.isdisjoint(others):",
        "if True:",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[rotations of heads-halves-outer]",
    ),
    "parts that stay apart are joined": Fault(
        DATAFLOW + "rows.py",
        "if where.isdisjoint(others):",
        "if False:",
        "partition/dataflow/test_forms.py::test_stacked_layers_have_rows_of_their_own",
    ),
    "outputs that are never used are one block": Fault(
        DATAFLOW + "backward.py",
        "if are_all(acts, ALONE) or np.all(np.equal(acts, UNSEEN)):",
        "if are_all(acts, ALONE):",
        "partition/dataflow/test_infer.py::test_a_model_has_the_blocks_derived_by_hand[forces]",
    ),
    "features of an operand that runs through are dropped": Fault(
        DATAFLOW + "forward.py",
        "features={**found.features, number: Part(distance, 0, count)},",
        "features={number: Part(distance, 0, count)},",
        "partition/dataflow/test_rows.py::test_a_model_has_the_rows_and_columns_derived_by_hand[gate and up after filters]",
    ),
    "an axis of data does not move": Fault(
        DATAFLOW + "forward.py",
        """value.axes = [(Factor(size, moves=size > 1),) for size in value.shape]


def _pass""",
        """value.axes = [(Factor(size),) for size in value.shape]


def _pass""",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[layers-by index-mean]",
    ),
    "a slice of outputs is all of them": Fault(
        DATAFLOW + "forward.py",
        "if last - first + 1 < factor.size:",
        "if False:",
        "partition/dataflow/test_forms.py::test_a_middle_axis_is_cut_into_heads_and_parts",
    ),
    "taps are gains": Fault(
        DATAFLOW + "taps.py",
        "slices |= _differing(product, [family[j] for j in summed])",
        "pass",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[filters-shifts-mean]",
    ),
    "the last index of a number is its tap": Fault(
        DATAFLOW + "taps.py",
        "return found or {id(product.slices[0])}",
        "return {id(product.slices[0])}",
        "partition/dataflow/test_forms.py::test_a_kernel_whose_numbers_are_taken_one_by_one_is_cut_by_neuron[numbers]",
    ),
    "a sum of pairs is a filter": Fault(
        DATAFLOW + "taps.py",
        "and size(step.outputs[0]) <= max(size(step.inputs[0]), size(step.inputs[-1]))",
        "",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[pairs-a loop-mean]",
    ),
    "tables at one number share their columns": Fault(
        DATAFLOW + "indices.py",
        "if not any(scalar is None for scalar in scalars) or numbers.operand_batching_dims:",
        "if True:",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[tables-one index is a number-outer]",
    ),
    "tables that one index reads share their columns": Fault(
        DATAFLOW + "rules/indexing.py",
        "shared | _counted(facts, step, batch)",
        "shared",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form[tables-two indices-outer]",
    ),
    "parts of a flat kernel share their rows": Fault(
        DATAFLOW + "rows.py",
        "merged *= math.prod(values[place].shape[a] for a in beside)",
        "return 0, 1",
        "partition/dataflow/test_forms.py::test_a_kernel_that_is_flattened_and_split_has_a_row_for_each_part",
    ),
    "a second moment goes back in 16 bits": Fault(
        "convert.py",
        "of_real = widen(jax.tree.leaves(v)[0].dtype)",
        "of_real = jnp.result_type(param)",
        "test_convert.py::test_second_moments_of_float16_parameters_survive_another_cut",
    ),
    "a product of matrices is a tap whatever else reads it": Fault(
        DATAFLOW + "taps.py",
        "(is_matrix and len(steps) > 1)",
        "False",
        "partition/dataflow/test_forms.py::test_layers_that_read_one_input_are_no_convolution",
    ),
    "axes that are left out are one": Fault(
        DATAFLOW + "axes.py",
        "if distances(old) == distances(factor)]",
        "]",
        "partition/dataflow/test_forms.py::test_a_middle_axis_is_cut_into_heads_and_parts",
    ),
    "labels are remembered by a hash": Fault(
        "labels.py",
        "exact = (of, args, treedef, tuple(shapes))",
        "exact = hash((of, args, treedef, tuple(shapes)))",
        "test_transform.py::test_two_models_of_the_same_shapes_keep_their_specs_apart[int8]",
    ),
    "muon's functions see gradients": Fault(
        "muon.py",
        "both(updates if params is None else params)",
        "both(updates)",
        "test_muon.py::test_label_functions_get_the_parameters_and_not_the_gradients[True]",
    ),
    "muon's functions see a part": Fault(
        "muon.py",
        "given = ask(function_of_some, given, tuple(parts or n is None for n in found))",
        "pass",
        "test_muon.py::test_label_functions_get_all_parameters[False]",
    ),
    "a default sees a part": Fault(
        "labels.py",
        "block_specs(params, needed=needed)",
        "block_specs(some)",
        "test_labels.py::test_a_default_sees_all_parameters",
    ),
    "every parameter needs a spec": Fault(
        "convert.py",
        "[path in needed for path in by_path]",
        "[True] * len(by_path)",
        "test_convert.py::test_parameters_without_moments_need_no_specs",
    ),
    "names of wrapped variables are lost": Fault(
        "boxes.py",
        'getattr(box, "metadata", {})',
        "{}",
        "test_placement.py::test_linens_boxes_of_nnx_variables_keep_their_names",
    ),
    "booleans are not widened": Fault(
        "sums.py",
        "wide(of(wide(x))) if of else wide(x)",
        "of(wide(x)) if of else wide(x)",
        "test_sums.py::test_means_of_booleans_are_shares",
    ),
    "a gradient without params is not looked at": Fault(
        "transform.py",
        "m if params is None and mu_dtype is None else shape",
        "shape",
        "test_labels.py::test_wrong_inputs_are_one_clear_error",
    ),
    "the logarithm of a rate of 0": Fault(
        "transform.py",
        "exact, 1 - decay**count)",
        "exact, 1.0)",
        "test_transform.py::test_derivatives_by_decay_rates_are_optaxs",
    ),
    "a likelihood is an inner product": Fault(
        "partition/dataflow/rules/inner_products.py",
        "not facts.is_summed_into_losses(\n        step.outputs[0]\n    )",
        "True",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[gaussian_likelihood]",
    ),
    "a nonlinear loss is a sum of terms": Fault(
        "partition/dataflow/domain.py",
        "not is_learned and step.inputs.count(place) == 1",
        "not is_learned",
        "partition/dataflow/test_literature.py::test_a_squared_sum_is_an_inner_product",
    ),
    "widened parameters are not seen": Fault(
        "rounding.py",
        "        check_in_bfloat16(params)\n        check_order",
        "        check_order",
        "test_rounding.py::test_parameters_that_were_widened_are_refused",
    ),
    "the parts of a kernel are left together": Fault(
        "muon.py",
        "specs = specs_of(given, part, is_init) if parts else",
        "specs = specs_of(given, part, is_init) if False else",
        "test_muon.py::test_each_part_of_a_fused_kernel_is_a_matrix_of_its_own[qkv]",
    ),
    "Muon's codes are cut off": Fault(
        "quantized.py",
        "code += chance * 2.0**_CUT > random_bits(_CUT, m.shape, seed)",
        "code += 0.0 * chance",
        "test_muon.py::test_codes_round_to_a_neighbour_and_are_right_on_average",
    ),
    "a row's largest entry is rounded down": Fault(
        "quantized.py",
        "(top * (1 + 2.0**-8)).astype",
        "top.astype",
        "test_muon.py::test_codes_round_to_a_neighbour_and_are_right_on_average",
    ),
    "biases of experts are rows of a table": Fault(
        DATAFLOW + "forward.py",
        "members, repeats = find_members(facts), find_repeats(facts)",
        "members, repeats = frozenset(), find_repeats(facts)",
        "partition/dataflow/test_forms.py::test_a_function_has_the_same_blocks_in_every_form",
    ),
    "rows with the index of a kernel are biases": Fault(
        DATAFLOW + "members.py",
        "indices.keys() - kernels - inputs",
        "indices.keys() - kernels",
        "partition/dataflow/test_forms.py::test_a_table_with_the_index_of_an_expert_is_a_table",
    ),
    "a mask function sees the updates": Fault(
        "transform.py",
        "mask(params) if is_called else mask",
        "mask",
        "test_optax_wrappers.py::test_a_mask_function_sees_the_dtypes_of_parameters",
    ),
    "the columns of another state go stale": Fault(
        "product.py",
        "is_used = lambda b, spec: isinstance(spec, Outer) or jnp.size(b) != 1",
        "is_used = lambda b, spec: isinstance(spec, Outer)",
        "test_product.py::test_a_state_of_rows_and_columns_is_refused_for_rows_alone",
    ),
    "a moment in float16 stays infinite": Fault(
        "quantized.py",
        "m = jnp.clip(m, -most, most)",
        "pass",
        "test_hyperparams.py::test_a_moment_that_overflows_in_float16_recovers",
    ),
    "seeds of a count of its own are made in a loop": Fault(
        "random_bits.py",
        "is_auto = all({*mesh.axis_types} <= {AxisType.Auto} for mesh in meshes)",
        "is_auto = not any(AxisType.Explicit in mesh.axis_types for mesh in meshes)",
        "test_sharding.py::test_members_of_shard_map_train_in_8_bits[adam_mini]",
    ),
    "names of axes are looked for in every update": Fault(
        "labels.py",
        "if alike in memory and not is_init:",
        "if False:",
        "partition/test_logical_axes.py::test_an_nnx_optimizer_trains_with_the_names_of_axes",
    ),
    "models with other names of axes share their specs": Fault(
        "labels.py",
        "if exact in memory and not is_init:",
        "if False:",
        "partition/test_logical_axes.py::test_two_models_with_the_same_paths_keep_their_own_specs",
    ),
    "without squares every step is short": Fault(
        "transform.py",
        " & (exponent <= 80)",
        "",
        "test_bounded_step.py::test_a_step_that_adam_makes_is_not_shortened[False-betas5]",
    ),
    "decay in 16 bits": Fault(
        "transform.py",
        "wide(x) if _is_inexact(p)",
        "x if _is_inexact(p)",
        "test_transform.py::test_weight_decay_of_bfloat16_parameters_is_rounded_once",
    ),
    "muon's mask sees a part": Fault(
        "muon.py",
        "mask = ask(_mask_of, mask)",
        "pass",
        "test_muon.py::test_a_mask_function_gets_all_parameters",
    ),
    "muon's beta in 16 bits": Fault(
        "muon.py",
        "widened(beta)",
        "beta",
        "test_muon.py::test_injected_numbers_of_16_bits_are_widened",
    ),
    "functions of muon are asked again": Fault(
        "muon.py",
        "return both(params, is_init=True)",
        "return both(params)",
        "partition/test_logical_axes.py::test_an_nnx_optimizer_calls_functions_of_names_once[muon_mini]",
    ),
    "outputs of critics are scores": Fault(
        DATAFLOW + "rules/inner_products.py",
        "else facts.is_linear(place, data.uses(data.contracted))",
        "else True",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[critics of one hidden layer-1]",
    ),
    "kernels of examples are keys": Fault(
        DATAFLOW + "rules/inner_products.py",
        "return has_positions and all(",
        "return all(",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[a kernel of each example-1]",
    ),
    "a function of a use is linear": Fault(
        DATAFLOW + "domain.py",
        "if step.name in LINEAR | LAYOUT and not is_function:",
        "if step.name in LINEAR | LAYOUT:",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[critics of one hidden layer-2]",
    ),
    "a product of two products is no chain": Fault(
        DATAFLOW + "rules/contractions.py",
        "    if are_two:\n",
        "    if are_two and not all(side.value.made for side in sides):\n",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[four kernels-2]",
    ),
    "an updated kernel is a product": Fault(
        DATAFLOW + "rules/elementwise.py",
        "found.made = 0  #",
        "pass  #",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[a gated low-rank update of a kernel of heads-1]",
    ),
    "a function of data and a parameter is a kernel": Fault(
        DATAFLOW + "rules/elementwise.py",
        "if is_layer or (",
        "if (",
        "partition/dataflow/test_forms.py::test_gaussians_that_mix_kernels_are_not_joined[a dot]",
    ),
    "one side has positions": Fault(
        DATAFLOW + "rules/inner_products.py",
        "has_positions = all(",
        "has_positions = any(",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[edge_matrices_on_vector_features]",
    ),
    "a layer of members is a query": Fault(
        DATAFLOW + "rules/inner_products.py",
        "facts.weights_others(step.outputs[0])\n                if has_outputs",
        "True\n                if has_outputs",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[low_rank_kernel_of_each_head]",
    ),
    "edges are shifts": Fault(
        DATAFLOW + "taps.py",
        'step.name == "gather" and step.inputs[1] in program.known',
        'step.name == "gather"',
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[relational_graph_convolution_in_a_loop]",
    ),
    "a comparison has no derivative": Fault(
        DATAFLOW + "inline.py",
        "if here.has_derivative and name in",
        "if False and name in",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[scores_of_a_supermask]",
    ),
    "a bilinear layer is a chain": Fault(
        DATAFLOW + "rules/elementwise.py",
        "or all(value.made for value in ins)",
        "",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[bilinear_gate_on_learned_embeddings]",
    ),
    "a maximum is linear": Fault(
        DATAFLOW + "rules/reductions.py",
        "if found.drops and value.made",
        "if False and value.made",
        "partition/dataflow/test_literature.py::test_outputs_that_act_apart_are_not_joined[maxout_on_learned_embeddings]",
    ),
    "indices have gradients": Fault(
        DATAFLOW + "matrices.py",
        "if step.name in _SORTS:",
        "if False:",
        "partition/dataflow/test_literature.py::test_an_index_makes_no_matrix_of_an_output_head",
    ),
    "products are split after they are computed": Fault(
        DATAFLOW + "inline.py",
        "    split_products(program)\n",
        "",
        "partition/dataflow/test_infer.py::test_one_function_is_cut_alike_however_it_is_written[kernels of groups, summed-1]",
    ),
}


# In a process that has imported JAX already. Its codes are none that Python ends with by itself.
PASSED, FAILED = 10, 11
RUN = """
import os, sys
for name in [name for name in sys.modules if name.split(".")[0] in ("optax_adam_mini", "tests")]:
    del sys.modules[name]
os.chdir({folder!r})
sys.path.insert(0, {folder!r})
os.environ.update(PYTHONPATH={folder!r}, PATH="", HYPOTHESIS_PROFILE="faults")
said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(said, 1)
os.dup2(said, 2)
import pytest
code = pytest.main(["-qq", "-p", "no:cacheprovider", "-m", "", {test!r}])
sys.stdout.flush()
os._exit({passed} + code)
"""


class Copy:
    """A copy of the package and its tests, in which faults are put one at a time."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(
            ["jax", "jax.numpy", "flax.nnx", "flax.linen", "chex"]
        )
        for part in ("optax_adam_mini", "tests", "docs", "examples", "benchmarks"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for part in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / part, folder / part)

    def outcome(self, fault: Fault) -> str:
        """The last lines of the test with the fault put in, from the word with which pytest ends.

        Raises:
            RuntimeError: if there was no such test, or it could not be run.
        """
        path = self.folder / "optax_adam_mini" / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise RuntimeError(
                f"{fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
            )
        path.write_text(text.replace(fault.old, fault.new))
        try:
            code = RUN.format(
                folder=str(self.folder), test=f"tests/{fault.caught_by}", passed=PASSED
            )
            run = self.processes.Process(target=exec, args=(code,))
            run.start()
            run.join()
        finally:
            path.write_text(text)
        if run.exitcode not in (PASSED, FAILED):
            said = self.folder / "said"
            raise RuntimeError(
                f"the test did not run:\n{said.read_text() if said.exists() else ''}"
            )
        return "caught" if run.exitcode == FAILED else "NOT CAUGHT"


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(pathlib.Path(folder))
        found = {}
        for name in names or FAULTS:
            found[name] = copy.outcome(FAULTS[name])
            print(f"{name}: {found[name]} by {FAULTS[name].caught_by}", flush=True)
    missed = list(found.values()).count("NOT CAUGHT")
    print(f"{len(found) - missed} of {len(found)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
