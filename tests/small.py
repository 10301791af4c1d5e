"""Small stand-ins on disk: pictures in class folders, and an autoencoder with random weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from PIL import Image

from models.autoencoder_kl import AutoencoderKL


def write_pictures(root: pathlib.Path, count: int) -> pathlib.Path:
    """JPEGs of 20 to 40 pixels a side in the class folders a, b and c, the first greyscale."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(256, size=(5, 5, 3), dtype=np.uint8)
        size = tuple(rng.integers(20, 41, size=2).tolist())
        picture = Image.fromarray(coarse).resize(size).convert("RGB" if i else "L")
        folder = root / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:03d}.jpg")
    return root


def write_autoencoder(folder: pathlib.Path, bias: float = 0.0, channels: int = 4) -> pathlib.Path:
    """Latents of half the size and `channels` channels; `bias` is added to the first one's mean."""
    fields = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    fields["latent_channels"] = channels
    params = jax.jit(AutoencoderKL(**fields).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params["params"]["quant_conv"]["bias"] += jnp.zeros(2 * channels).at[0].set(bias)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **fields}))
    weights = serialization.to_bytes(params["params"])
    (folder / "diffusion_flax_model.msgpack").write_bytes(weights)
    return folder
