"""Ways to choose the block specs: label functions, params -> pytree of `BlockSpec`."""
