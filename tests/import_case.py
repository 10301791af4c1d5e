"""Networks of other repositories with random weights: what oracles and stored cases share.

A case is a dict of tensors' names and shapes as the repository's own code has them, filled from a
seed; inputs are from a seed as well.
"""

import numpy as np

from models.dit import positions

# Times and labels are to be seen in the outputs, though initial weights would hardly show them.
LOUD = ("embedder", "TimestepEmbedder", "LabelEmbedder")
TIMES = np.array([0.25, 0.5, 0.6875, 0.9375], np.float32)
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2}
SIDE, CLASSES = 8, 10  # of the tiny networks: latents 8×8×4
CHANNELS = 4
STEPS = np.array([20, 150, 300, 450])  # of DiT's thousand, whose times are nowhere near an end
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def times_of(steps: np.ndarray) -> np.ndarray:
    """t (n,) float64 of DiT's steps: sqrt(1 − ᾱ) / sqrt(ᾱ) = t / (1 − t)."""
    signal, noise = np.sqrt(ALPHA_BAR[steps]), np.sqrt(1 - ALPHA_BAR[steps])
    return noise / (signal + noise)


def weights(shapes: dict[str, tuple[int, ...]], width: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Non-zero numbers for every tensor, float32; tables of positions as they are."""
    found = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        if name == "pos_embed":
            side = round(shape[1] ** 0.5)
            found[name] = positions(side, side, width)[None]
            continue
        scale = 0.5 / width**0.5 * (2 if any(word in name for word in LOUD) else 1)
        rng = np.random.default_rng([seed, i])
        found[name] = scale * rng.standard_normal(shape, np.float32)
    return found


def inputs(side: int, classes: int, n: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z (n, side, side, 4) float32, r (n,) float32 below TIMES, labels (n,) with the null label."""
    rng = np.random.default_rng(7)
    z = rng.standard_normal((n, side, side, CHANNELS), np.float32)
    r = (TIMES[:n] * np.array([0, 0.5, 0.25, 1])[:n]).astype(np.float32)
    labels = rng.integers(0, classes, n)
    labels[-1] = classes
    return z, r, labels
