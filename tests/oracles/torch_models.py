"""The torch side: diffusers' classes with random weights, and TAEF2 restated in torch."""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL_KL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SMALL_TINY = {
    "latent_channels": 5,
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
}


def kl(config: dict, seed: int = 0) -> AutoencoderKL:
    """diffusers' AutoencoderKL with random weights."""
    return randomised(AutoencoderKL(**config), seed)


def tiny(config: dict, seed: int = 0) -> AutoencoderTiny:
    """diffusers' AutoencoderTiny with random weights."""
    return randomised(AutoencoderTiny(**config), seed)


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, biases and norms too: nothing stays 0 or 1, so nothing hides."""
    random = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        values = random.standard_normal(tuple(parameter.shape), np.float32)
        if parameter.ndim > 1:
            values /= np.sqrt(np.prod(parameter.shape[1:]))
        else:
            values = 0.2 * values + (1 if name.endswith("weight") else 0)
        parameter.data = torch.from_numpy(values.astype(np.float32))
    return module.eval().requires_grad_(False)


def small_taef2(seed: int) -> torch.nn.Module:
    """TAEF2's kind at a tenth of its width, random."""
    return randomised(Taef2(width=8, latents=6), seed)


class Block(torch.nn.Module):
    """ReLU(x + three convolutions of x); with a pool, x is first x + pool(x)."""

    def __init__(self, width: int, pool: bool = False):
        super().__init__()
        three = [torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = torch.nn.Sequential(three[0], torch.nn.ReLU(), three[1], torch.nn.ReLU())
        self.conv.append(three[2])
        self.pool = None
        if pool:
            self.pool = torch.nn.Sequential(
                torch.nn.Conv2d(width, 4 * width, 1, bias=False),
                torch.nn.GroupNorm(4, 4 * width),
                torch.nn.ReLU(),
                torch.nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width, h, w) → the same."""
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Clamp(torch.nn.Module):
    """The soft bound of the latents."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Any shape → the same, within ±3."""
        return 3 * torch.tanh(z / 3)


class Taef2(torch.nn.Module):
    """The network that the weights' README describes, in the original's order of layers."""

    def __init__(self, width: int = 64, latents: int = 32):
        super().__init__()
        conv, up = torch.nn.Conv2d, torch.nn.Upsample

        def halve() -> list:
            return [conv(width, width, 3, stride=2, padding=1, bias=False)]

        def double() -> list:
            return [up(scale_factor=2), conv(width, width, 3, padding=1, bias=False)]

        def blocks(count: int, pool: bool = False) -> list:
            return [Block(width, pool) for _ in range(count)]

        self.encoder = torch.nn.Sequential(
            *[conv(3, width, 3, padding=1), *blocks(1), *halve(), *blocks(3), *halve()],
            *[*blocks(3), *halve(), *blocks(3, pool=True), conv(width, latents, 3, padding=1)],
        )
        self.decoder = torch.nn.Sequential(
            *[Clamp(), conv(latents, width, 3, padding=1), torch.nn.ReLU()],
            *[*blocks(3, pool=True), *double(), *blocks(3), *double(), *blocks(3), *double()],
            *[*blocks(1), conv(width, 3, 3, padding=1)],
        )

    def save(self, folder: pathlib.Path) -> None:
        """Writes the original's pair of files."""
        folder.mkdir(parents=True, exist_ok=True)
        for half in ("encoder", "decoder"):
            np.savez(folder / f"taef2_{half}.npz", **numpy_state(getattr(self, half)))


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters as NumPy arrays, by torch's names."""
    return {name: value.numpy() for name, value in module.state_dict().items()}


def pictures(n: int, height: int, width: int) -> np.ndarray:
    """uint8 (n, height, width, 3): smooth random pictures with some noise."""
    random = np.random.default_rng(1)
    coarse = random.integers(0, 256, (n, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    return np.clip(coarse + random.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)


def nchw(x: np.ndarray) -> torch.Tensor:
    """NHWC → NCHW, float32."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """NCHW → NHWC, float32."""
    return np.ascontiguousarray(x.float().numpy().transpose(0, 2, 3, 1))


def outputs(module: torch.nn.Module, picture: np.ndarray) -> dict[str, np.ndarray]:
    """What torch makes of uint8 pictures: latents (or mean, log_variance) and their decoding."""
    x = nchw(picture / np.float32(127.5) - 1)
    with torch.no_grad():
        if isinstance(module, Taef2):
            latents = module.encoder((x + 1) / 2)
            found = {"latents": latents, "reconstruction": 2 * module.decoder(latents) - 1}
        elif isinstance(module, AutoencoderTiny):
            latents = module.encode(x).latents
            found = {"latents": latents, "reconstruction": module.decode(latents).sample}
        else:
            posterior = module.encode(x).latent_dist
            found = {"mean": posterior.mean, "log_variance": posterior.logvar}
            found["reconstruction"] = module.decode(posterior.mean).sample
    return {name: nhwc(value) for name, value in found.items()}


def config_of(module: torch.nn.Module) -> str:
    """The config.json that diffusers writes for a module."""
    return json.dumps(json.loads(module.to_json_string()))
