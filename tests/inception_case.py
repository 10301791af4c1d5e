"""Weights and pictures for the tests of Inception, made from seeds: random, and the same anywhere.

Only `Generator.random` is used, whose numbers no version of NumPy has changed.
"""

import numpy as np

from models import inception

SIZES = ((32, 32), (64, 64), (256, 256), (299, 299), (300, 200), (512, 512))
# Protocol → size of two pictures whose features are stored in tests/data, and which features.
STORED = {
    "tf": ((32, 32), ("pool", "spatial", "logits")),
    "clean": ((300, 200), ("pool", "logits")),
    "pytorch": ((64, 64), ("pool", "logits")),
}


def tensors(seed: int) -> dict[str, np.ndarray]:
    """All 566 tensors of the .pth, named, shaped and typed as there.

    Convolutions keep the features' size about the same through the network; batch norms shift and
    scale by statistics that are far from 0 and 1.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for name, shape in sorted(inception.shapes().items()):
        uniform = rng.random(shape) - 0.5
        if name.endswith((".running_var", ".bn.weight")):
            uniform += 1
        elif name.endswith(".weight"):
            uniform *= np.sqrt(12 * 2.0 / np.prod(shape[1:]))
        made[name] = uniform.astype(np.float32)
        if name.endswith(".running_var"):
            counter = name.replace("running_var", "num_batches_tracked")
            made[counter] = np.array(1000, np.int64)
    return made


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """uint8 (count, height, width, 3): coarse coloured patches under fine noise, each its own."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.random((count, 5, 5, 3))
    rows, columns = (np.arange(size) * 5 // size for size in (height, width))
    noise = rng.random((count, height, width, 3))
    return (255 * (0.7 * coarse[:, rows][:, :, columns] + 0.3 * noise)).astype(np.uint8)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error as a share of how far the pictures' own features lie apart."""
    apart = np.abs(expected - expected.mean(0)).max()
    return float(np.abs(np.asarray(found) - expected).max() / apart)
