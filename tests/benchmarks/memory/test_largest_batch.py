import jax
import pytest

from benchmarks.memory.largest_batch import Options, bytes_with, largest_batch, main
from examples.common.cli import ConfigError
from examples.common.mesh import MeshConfig
from examples.common.text import TextConfig
from examples.llama.train import Config, make_program

NANO = Options(model="nano", devices=8)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 13])
def test_the_most_that_fits_is_found(most):
    assert largest_batch(lambda batch: batch <= most) == most


@pytest.mark.slow
def test_a_step_without_a_second_moment_is_smaller_by_it():
    config = Config(model="nano", data=TextConfig(tokenizer="bpe", vocab_size=32000),
                    devices=MeshConfig(mesh="fsdp=8"))  # fmt: skip
    params = make_program(config, "adamw").abstract_state().params
    second_moment = sum(4 * leaf.size / 8 for leaf in jax.tree.leaves(params))
    saved = bytes_with(NANO, "adamw", 4) - bytes_with(NANO, "adam_mini", 4)
    assert saved == pytest.approx(second_moment, rel=0.05)
    # Another sequence costs at least its logits, 64 x 32,000 in float32.
    more = bytes_with(NANO, "adamw", 5) - bytes_with(NANO, "adamw", 4)
    assert more >= 64 * 32000 * 4


def test_wrong_options_are_one_clear_error():
    with pytest.raises(ConfigError, match="--devices is 0, but must be at least 1"):
        main(Options(devices=0))
