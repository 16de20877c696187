"""Makes the golden trajectories with the PyTorch package adam-mini 1.1.1 (needs it and torch).

python -m tests.golden.generate
"""

import itertools
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("adam_mini_1_1_1.npz")
STEPS = 50
RECORDED = (1, 2, 3, 5, 10, 20, 30, 40, 50)
LEARNING_RATE = 3e-2
NUM_HEADS, NUM_KV_HEADS, DIM = 4, 2, 16
SETTINGS = {
    f"b1={b1},b2={b2},weight_decay={weight_decay}": (b1, b2, weight_decay)
    for (b1, b2), weight_decay in itertools.product([(0.9, 0.999), (0.8, 0.95)], [0.0, 0.1])
}
# PyTorch layouts (out, in); every branch of the reference is here.
SHAPES = {
    "embed.weight": (24, DIM),
    "layer.attn.q_proj.weight": (DIM, DIM),
    "layer.attn.k_proj.weight": (NUM_KV_HEADS * DIM // NUM_HEADS, DIM),
    "layer.attn.v_proj.weight": (NUM_KV_HEADS * DIM // NUM_HEADS, DIM),
    "layer.attn.o_proj.weight": (DIM, DIM),
    "layer.attn.o_proj.bias": (DIM,),
    "layer.mlp.up.weight": (32, DIM),
    "layer.mlp.up.bias": (32,),
    "layer.mlp.down.weight": (DIM, 32),
    "layer.norm.weight": (DIM,),
    "output.weight": (24, DIM),
}


def inputs() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Initial parameters, and gradients with a leading axis of steps: rows of very unequal size."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    grads: dict[str, np.ndarray] = {}
    for name, shape in SHAPES.items():
        rows = np.exp(2 * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        noise = rng.normal(size=(STEPS, *shape)) + rng.normal(size=shape)
        grads[name] = (rows * noise).astype(np.float32)
    return params, grads


def reference(
    params: dict[str, np.ndarray],
    grads: dict[str, np.ndarray],
    b1: float,
    b2: float,
    weight_decay: float,
) -> dict[str, np.ndarray]:
    """The parameters after each of the recorded steps of the reference implementation."""
    import torch
    from adam_mini import Adam_mini

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    optimizer = Adam_mini(
        tensors.items(),
        lr=LEARNING_RATE,
        betas=(b1, b2),
        eps=1e-8,
        weight_decay=weight_decay,
        dim=DIM,
        n_heads=NUM_HEADS,
        n_kv_heads=NUM_KV_HEADS,
        verbose=False,
    )
    recorded: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for step in range(1, STEPS + 1):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name][step - 1])
        optimizer.step()
        if step in RECORDED:
            for name, tensor in tensors.items():
                recorded[name].append(tensor.detach().numpy().copy())
    return {name: np.stack(values) for name, values in recorded.items()}


def main() -> None:
    params, grads = inputs()
    arrays = {f"params/{name}": value for name, value in params.items()}
    arrays |= {f"grads/{name}": value for name, value in grads.items()}
    for setting, hyperparams in SETTINGS.items():
        trajectory = reference(params, grads, *hyperparams)
        arrays |= {f"{setting}/{name}": value for name, value in trajectory.items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
