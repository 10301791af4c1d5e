"""A residual MLP for points in the plane: (z, r, t, label) → velocity."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.layers import Condition, dropout

FREQUENCIES = np.pi / 2 * np.array([1.0, 2.0, 4.0], np.float32)


class MLP(nn.Module):
    """`depth` residual blocks of width `hidden_size`, the condition added inside each.

    Beside the points it sees sines and cosines of them, with which edges come out sharp
    (arXiv 2006.10739). Few and low frequencies, since du/dt grows with them.
    """

    depth: int
    hidden_size: int
    num_classes: int = 0
    mlp_ratio: float = 1.0
    dropout: float = 0.0
    time_inputs: str = "t,t-r"

    @nn.compact
    def __call__(
        self, z: Array, r: Array, t: Array, label: Array, dropout_keys: Array | None = None
    ) -> Array:
        """Returns u (n, features) float32, as `models.dit.DiT` does for pictures.

        Args:
          z: (n, features) float32. r, t: (n,). label: (n,) int32. dropout_keys: (n,) or None.
        """
        condition = Condition(
            self.hidden_size, self.num_classes, self.time_inputs, name="condition"
        )
        c = nn.silu(condition(r, t, label))
        inner = round(self.mlp_ratio * self.hidden_size)
        angles = (z[..., None] * FREQUENCIES[None, None]).reshape(z.shape[0], -1)
        x = nn.Dense(self.hidden_size, name="in")(
            jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        )
        for layer in range(self.depth):
            h = nn.Dense(inner, name=f"up_{layer}")(x)
            h += nn.Dense(inner, use_bias=False, name=f"condition_{layer}")(c)
            h = nn.Dense(self.hidden_size, name=f"down_{layer}")(nn.silu(h))
            x += dropout(h, self.dropout, dropout_keys, layer)
        init = nn.initializers.zeros_init()
        return nn.Dense(z.shape[-1], kernel_init=init, name="out")(x)
