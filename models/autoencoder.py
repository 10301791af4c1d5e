"""Pictures ↔ what the flow sees: the sole owner of scale and range.

An `Autoencoder` turns what lies on disk (moments) into what is trained on, and back into pictures.
For pixels the moments are the uint8 picture itself.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial


class Autoencoder(NamedTuple):
    """Pure functions with names; a pytree whose leaves are their parameters.

    So it can be an argument of `jax.jit`: other parameters of the same network compile nothing.
    moments: picture (n, ...) → what is stored, raw. sample: (moments of any float type, keys (n,))
    → float32 x, near zero mean and unit scale. decode: x → picture.
    """

    moments: Callable[[Array], Array]
    sample: Callable[[Array, Array], Array]
    decode: Callable[[Array], Array]


class Scale(NamedTuple):
    """x = (z − shift) · factor for raw latents z; both float32, (c,)."""

    shift: np.ndarray | Array
    factor: np.ndarray | Array

    @classmethod
    def of(cls, config: Mapping[str, Any], channels: int, scaling_factor: float) -> "Scale":
        """Reads a diffusers config: x = (z − mean) · scaling_factor / std.

        Args:
          config: may hold scaling_factor, shift_factor or latents_mean, latents_std.
          channels: of the latents.
          scaling_factor: where the config has none.
        Raises:
          ValueError: numbers that are none, of another count than the channels, or a scale of 0.
        """
        scaling = _numbers(config, "scaling_factor", scaling_factor, 1)
        shift = _numbers(config, "shift_factor", 0.0, 1)
        mean = _numbers(config, "latents_mean", shift, channels)
        std = _numbers(config, "latents_std", 1.0, channels)
        if not (scaling.all() and std.all()):
            raise ValueError("scaling_factor and latents_std must not be 0")
        shift, factor = np.zeros(channels) + mean, np.zeros(channels) + scaling / std
        return cls(shift.astype(np.float32), factor.astype(np.float32))


def pixels() -> Autoencoder:
    """uint8 pictures as x in [−1, 1]; back by clip(trunc(127.5 x + 128)), as files hold them."""
    return Autoencoder(Partial(_as_it_is), Partial(_signed_sample), Partial(_quantised))


def points() -> Autoencoder:
    """Points in the plane are what they are, float32."""
    return Autoencoder(Partial(_as_it_is), Partial(_as_it_is), Partial(_as_it_is))


def kl(network: nn.Module, params: Mapping, scale: Scale, slice_size: int = 0) -> Autoencoder:
    """An autoencoder with a posterior (`models.autoencoder_kl.AutoencoderKL`).

    The moments are float32 (n, h, w, 2c): the posterior's mean, then its standard deviation. A
    sample is a fresh one of the posterior per key.

    Args:
      params: float32 parameters of the network.
      slice_size: pictures that `decode` holds at once; 0: all.
    """
    return _bound(Posterior(network), _posterior_sample, network, params, scale, slice_size)


def tiny(network: nn.Module, params: Mapping, scale: Scale, slice_size: int = 0) -> Autoencoder:
    """An autoencoder without one (`models.autoencoder_tiny.AutoencoderTiny`).

    The moments are the raw latents, float32 (n, h, w, c). Arguments are those of `kl`.
    """
    return _bound(Latents(network), _latent_sample, network, params, scale, slice_size)


def _bound(moments, sample, network, params, scale, slice_size) -> Autoencoder:
    """Each function with the parameters that it uses."""
    scale = Scale(jnp.asarray(scale.shift), jnp.asarray(scale.factor))
    encoder = {name: params[name] for name in ("encoder", "quant_conv") if name in params}
    decoder = {name: params[name] for name in ("decoder", "post_quant_conv") if name in params}
    return Autoencoder(
        Partial(moments, encoder),
        Partial(sample, scale),
        Partial(Decode(network, slice_size), decoder, scale),
    )


# Functions as values: two of them are equal where their fields are, which is what jit compares.


@dataclasses.dataclass(frozen=True)
class Posterior:
    """uint8 picture → mean and standard deviation of the posterior."""

    network: nn.Module

    def __call__(self, params: Mapping, picture: Array) -> Array:
        """Returns float32 (n, h, w, 2c)."""
        mean, log_variance = _apply(self.network, params, _signed(picture), "encode")
        return jnp.concatenate([mean, jnp.exp(0.5 * log_variance)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Latents:
    """uint8 picture → raw latents."""

    network: nn.Module

    def __call__(self, params: Mapping, picture: Array) -> Array:
        """Returns float32 (n, h, w, c)."""
        return _apply(self.network, params, _signed(picture), "encode")


@dataclasses.dataclass(frozen=True)
class Decode:
    """Scaled latents → uint8 picture, `slice_size` pictures at a time (0: all at once)."""

    network: nn.Module
    slice_size: int

    def __call__(self, params: Mapping, scale: Scale, x: Array) -> Array:
        """Returns uint8 (n, H, W, C)."""

        def pictures(x: Array) -> Array:
            z = x / _row(scale.factor) + _row(scale.shift)
            return _quantised(_apply(self.network, params, z, "decode"))

        return _in_slices(pictures, x.astype(jnp.float32), self.slice_size)


def _apply(network: nn.Module, params: Mapping, x: Array, method: str) -> Any:
    return network.apply({"params": params}, x, method=method)


def _in_slices(function: Callable[[Array], Array], x: Array, size: int) -> Array:
    """`function` over `size` items at a time.

    A slice takes items from all over the batch, so that where the batch lies on several devices,
    and their number divides `size`, every device has its share of every slice.
    """
    n = len(x)
    if not 0 < size < n:
        return function(x)
    share = math.gcd(n, size)  # even slices; on several devices both are multiples of their number
    size = -(-n // -(-n // size) // share) * share
    x = jnp.pad(x, [(0, -n % size)] + [(0, 0)] * (x.ndim - 1))
    slices = x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(function, slices).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])[:n]


def _posterior_sample(scale: Scale, moments: Array, keys: Array) -> Array:
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return _scaled(mean + std * noise, scale)


def _latent_sample(scale: Scale, moments: Array, keys: Array) -> Array:
    return _scaled(moments.astype(jnp.float32), scale)


def _as_it_is(x: Array, keys: Array | None = None) -> Array:
    return x


def _signed(picture: Array) -> Array:
    """uint8 → float32 in [−1, 1]."""
    return picture.astype(jnp.float32) / 127.5 - 1


def _signed_sample(moments: Array, keys: Array) -> Array:
    return _signed(moments)


def _quantised(x: Array) -> Array:
    """float32 in [−1, 1] → uint8, as files hold pictures."""
    return jnp.clip(jnp.trunc(127.5 * x + 128), 0, 255).astype(jnp.uint8)


def _scaled(z: Array, scale: Scale) -> Array:
    return (z - _row(scale.shift)) * _row(scale.factor)


def _row(values: np.ndarray | Array) -> Array:
    """(c,) → (1, 1, 1, c)."""
    return jnp.asarray(values)[None, None, None]


def _numbers(config: Mapping[str, Any], key: str, default: Any, count: int) -> np.ndarray:
    """The finite numbers of a key, float64 (1,) or (count,); null is as good as absent."""
    value = config.get(key)
    value = default if value is None else value
    try:
        found = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        found = np.array([np.nan])
    allowed = isinstance(value, Sequence | np.ndarray | int | float) and np.isfinite(found).all()
    if not allowed or found.shape not in ((1,), (count,)):
        raise ValueError(f"{key}={value!r}: expected {count} finite numbers")
    return found
