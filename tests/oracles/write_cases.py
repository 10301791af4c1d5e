"""Writes the small cases in tests/data that hold the parity with torch where torch is not.

    .venv/bin/python -m tests.oracles.write_cases

A case is one safetensors file. Of an autoencoder: "picture", torch's outputs, "weights/NAME" by
torch's names, and in its metadata the config.json (absent for the original TAESD's pair of files).
Of Inception: "PROTOCOL/FEATURES", for weights and pictures that are made from seeds.
"""

import pathlib

import numpy as np
import safetensors.numpy

from tests import inception_case
from tests.oracles import torch_inception
from tests.oracles import torch_models as oracle

DATA = pathlib.Path(__file__).parents[1] / "data"
CASES = {
    "kl": lambda: oracle.kl(oracle.SMALL_KL, seed=4),
    "kl_shifted": lambda: oracle.kl(
        oracle.SMALL_KL
        | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
        | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        seed=5,
    ),
    "tiny": lambda: oracle.tiny(oracle.SMALL_TINY, seed=6),
    "taef2": lambda: oracle.small_taef2(seed=7),
}


def main() -> None:
    """Writes every case."""
    DATA.mkdir(exist_ok=True)
    picture = oracle.pictures(2, 16, 24)
    for name, build in CASES.items():
        module = build()
        weights = {f"weights/{key}": value for key, value in oracle.numpy_state(module).items()}
        arrays = {"picture": picture, **oracle.outputs(module, picture), **weights}
        config = {} if name == "taef2" else {"config": oracle.config_of(module)}
        arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        path = DATA / f"autoencoder_{name}.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata=config)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")
    write_inception()


def write_inception() -> None:
    """Writes what torch-fidelity's Inception makes of a few pictures."""
    network, arrays = torch_inception.Oracle(seed=1), {}
    for protocol, (size, wanted) in inception_case.STORED.items():
        features = network(inception_case.pictures(2, *size), protocol)
        arrays |= {f"{protocol}/{name}": features[name] for name in wanted}
    path = DATA / "inception.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
