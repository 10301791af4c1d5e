"""What else than a velocity a network may be taught to predict, read as a velocity.

"data": x of the network is z_t − t u, so that u = (z_t − x) / t (pixel MeanFlow, arXiv 2601.22158):
what a network on pixels can say best, since pictures lie on few dimensions and noise on all. Below
`LEAST` t counts as that, which bounds what an error of x makes of u.

"noise": ε of the variance-preserving diffusion of DiT (arXiv 2212.09748; guided-diffusion's linear
schedule, β from 1e-4 to 0.02 over 1000 steps), y_τ = √ᾱ_τ x + √(1 − ᾱ_τ) ε. The point
z_t = (1 − t) x + t ε of our line lies on that curve but for its length: z / n = y_τ with
n² = (1 − t)² + t² and ᾱ_τ = (1 − t)² / n². From x = (z − t ε) / (1 − t) then
v = ε − x = (ε − z) / (1 − t).
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

PREDICTIONS = ("velocity", "data", "noise")
LEAST = 0.05  # of t, by which x is divided
_BETAS = np.linspace(1e-4, 0.02, 1000)
# Of each step τ the time t, where √((1 − ᾱ) / ᾱ) = t / (1 − t): it rises with τ.
_RATIO = np.sqrt(1 / np.cumprod(1 - _BETAS) - 1)
TIMES = (_RATIO / (1 + _RATIO)).astype(np.float32)


def velocity_from_data(x: Array, z: Array, t: Array) -> Array:
    """u (n, ...) of the data x (n, ...) that a network predicts at z (n, ...) and t (n,)."""
    return (z - x) / jnp.maximum(t, LEAST).reshape(-1, *[1] * (z.ndim - 1))


def diffusion_step(t: Array) -> Array:
    """τ (n,) float32 in [0, 999] of times t (n,), between the steps interpolated.

    Times below the first step's (0.01) and above the last one's (0.9937) get that step.
    """
    return jnp.interp(t, TIMES, np.arange(1000, dtype=np.float32))


def velocity_from_noise(predict: Callable, z: Array, t: Array) -> Array:
    """v (n, ...) at z (n, ...) and t (n,), from `predict(y, τ)` → ε (n, ...).

    Above the last step's time, where the data are below one part in a hundred and 1 − t divides by
    nothing, z is taken to lie at that time.
    """
    t = jnp.minimum(t, TIMES[-1])
    per_sample = t.reshape(-1, *[1] * (z.ndim - 1))
    length = jnp.sqrt((1 - per_sample) ** 2 + per_sample**2)
    return (predict(z / length, diffusion_step(t)) - z) / (1 - per_sample)
