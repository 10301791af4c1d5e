"""torch-fidelity's Inception with random weights, and the resizes of torch and Pillow."""

import pathlib
import tempfile

import numpy as np
import torch
from PIL import Image

from tests import inception_case
from tests.oracles import fidelity

SIDE = 299


class Oracle:
    """uint8 pictures (n, H, W, 3) → pool, spatial and logits, by torch-fidelity's network."""

    def __init__(self, seed: int):
        state = {name: torch.tensor(a) for name, a in inception_case.tensors(seed).items()}
        self.module = fidelity.module("feature_extractor_inceptionv3")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "weights.pth"
            torch.save(state, path)  # which is loaded strictly: no name more or less
            self.network = self.module.FeatureExtractorInceptionV3(
                "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module, _inputs, output) -> None:
        self.branch = output

    def __call__(self, pictures: np.ndarray, protocol: str) -> dict[str, np.ndarray]:
        """The features, float32; a protocol other than torch-fidelity's own replaces its resize."""
        own = self.module.interpolate_bilinear_2d_like_tensorflow1x
        if protocol != "tf":  # what follows the resize there is (x − 128)/128
            prepared = RANGES[protocol](pictures)
            self.module.interpolate_bilinear_2d_like_tensorflow1x = lambda *_, **__: prepared
        try:
            pool, logits = self.network(_nchw(pictures))
        finally:
            self.module.interpolate_bilinear_2d_like_tensorflow1x = own
        spatial = self.branch[:, :7].permute(0, 2, 3, 1).flatten(1)  # as ADM: NHWC flattened
        named = {"pool": pool, "spatial": spatial, "logits": logits}
        return {name: value.numpy() for name, value in named.items()}


def _nchw(pictures: np.ndarray) -> torch.Tensor:
    return torch.tensor(pictures).permute(0, 3, 1, 2)


def tf1_bilinear(pictures: np.ndarray, side: int) -> np.ndarray:
    """torch-fidelity's TF1 resize, float32 NHWC."""
    module = fidelity.module("interpolate_compat_tensorflow")
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    x = resize(_nchw(pictures).float(), size=(side, side), align_corners=False)
    return x.permute(0, 2, 3, 1).numpy()


def half_pixel_bilinear(pictures: np.ndarray, side: int) -> np.ndarray:
    """torch's interpolate as pytorch-fid calls it, float32 NHWC."""
    x = torch.nn.functional.interpolate(
        _nchw(pictures).float(), (side, side), mode="bilinear", align_corners=False
    )
    return x.permute(0, 2, 3, 1).numpy()


def pil_bicubic(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pillow's bicubic channel by channel in mode F, clipped, as clean-fid calls it; NHWC."""
    planes = pictures.astype(np.float32).transpose(0, 3, 1, 2)
    resized = [
        [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))]
        for plane in planes.reshape(-1, *planes.shape[2:])
    ]
    stacked = np.stack(resized).reshape(*planes.shape[:2], side, side)
    return stacked.transpose(0, 2, 3, 1).clip(0, 255)


def _clean(pictures: np.ndarray) -> torch.Tensor:
    return torch.tensor(pil_bicubic(pictures, SIDE)).permute(0, 3, 1, 2)


def _pytorch(pictures: np.ndarray) -> torch.Tensor:
    """pytorch-fid: [0, 1], resized, 2x − 1; written so that (· − 128)/128 gives that."""
    x = torch.nn.functional.interpolate(
        _nchw(pictures).float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False
    )
    return (2 * x - 1) * 128 + 128


RANGES = {"clean": _clean, "pytorch": _pytorch}
