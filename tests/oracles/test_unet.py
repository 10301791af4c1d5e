"""The U-Net against the network of MeanFlow's authors for CIFAR-10, on the same weights.

    git -C $PEERS clone https://github.com/Gsunshine/py-meanflow

Embeddings of times are this project's own, so that both get the same embedding, whatever the times.
"""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models.layers import Condition
from models.unet import UNet
from tests.oracles import peers

SIZES = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "channel_mult_noise": 2}


@pytest.fixture
def theirs(monkeypatch):
    """Their module, imported under a name of its own."""
    package = types.ModuleType("peer_meanflow_models")
    package.__path__ = [str(peers.folder("py-meanflow") / "meanflow" / "models")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield importlib.import_module(f"{package.__name__}.unet")
    for name in ("unet", "groupnorm"):
        sys.modules.pop(f"{package.__name__}.{name}", None)


def array(tensor: torch.Tensor) -> jax.Array:
    """Kernels with outputs last, as Flax has them."""
    x = tensor.detach().numpy()
    return jnp.asarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T)


def layer(module, kernel: str = "kernel") -> dict:
    return {kernel: array(module.weight), "bias": array(module.bias)}


def dense(module) -> dict:
    """A convolution by 1 × 1 as a product."""
    found = layer(module)
    return found | {"kernel": found["kernel"].reshape(found["kernel"].shape[-2:])}


def block(module) -> dict:
    found = {f"conv_{i}": layer(getattr(module, f"conv{i}")) for i in range(2)}
    norms = 3 if module.num_heads else 2
    found |= {f"norm_{i}": layer(getattr(module, f"norm{i}"), "scale") for i in range(norms)}
    found["condition"] = layer(module.affine)
    if module.skip is not None:
        found["skip"] = layer(module.skip)
    if module.num_heads:
        found |= {"qkv": dense(module.qkv), "proj": dense(module.proj)}
    return found


def translated(network) -> dict:
    """Their parameters under our names, but for the embedding."""
    found = {}
    for way, parts in (("encoder", network.enc), ("decoder", network.dec)):
        for key, module in parts.items():
            side, name = key.split("x")[0], key.partition("_")[2]
            level = {16: 0, 8: 1, 4: 2}[int(side)]
            if name.startswith("block"):
                found[f"{way}_{level}_{name.removeprefix('block')}"] = block(module)
            elif name in ("up", "down"):
                found[f"{name}_{level}"] = block(module)
            elif name in ("in0", "in1"):
                found[f"middle_{name[-1]}"] = block(module)
            elif name == "aux_norm":
                found["norm_out"] = layer(module, "scale")
            else:
                found["in" if name == "conv" else "out"] = layer(module)
    return found


@pytest.mark.parametrize(("resample", "taps"), [("box", [1, 1]), ("fir", [1, 3, 3, 1])])
def test_the_same_as_theirs_on_the_same_weights(theirs, resample, taps):
    network = theirs.SongUNet(
        **SIZES, model_channels=16, channel_mult=[1, 2, 2], num_blocks=2, attn_resolutions=[8],
        resample_filter=taps, dropout=0.2,
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for parameter in network.parameters():
        spread = 0.1 if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, std=spread)
    torch.nn.init.zeros_(network.map_layer1.weight)
    module = UNet(
        hidden_size=16, depth=2, num_heads=1, channel_multipliers=(1, 2, 2),
        attention_resolutions=(8,), resample=resample, dropout=0.2,
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    t, label = jnp.array([0.3, 0.8]), jnp.zeros(2, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, t, label)["params"]
    condition = jax.tree.map(lambda a: jnp.zeros(a.shape), shapes["condition"])
    condition["time_t"]["out"]["bias"] = array(network.map_layer1.bias)
    params = translated(network) | {"condition": condition}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    with torch.no_grad():
        times = torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.2])
        expected = network(torch.from_numpy(x).permute(0, 3, 1, 2), times).permute(0, 2, 3, 1)
    u = jax.jit(module.apply)({"params": params}, x, 0.5 * t, t, label)
    assert np.abs(expected.numpy()).max() > 0.3
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-4)


def test_as_many_parameters_as_theirs(theirs):
    """At CIFAR-10's size, the embedding apart: 128 channels, 2,2,2, 4 blocks, attention at 16."""
    network = theirs.SongUNet(
        **(SIZES | {"img_resolution": 32}), channel_mult=[2, 2, 2], resample_filter=[1, 3, 3, 1]
    )
    embedding = (*network.map_layer0.parameters(), *network.map_layer1.parameters())
    ours = UNet(128, 4, 1, (2, 2, 2), (16,), "fir")
    z, t = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)
    found = jax.eval_shape(ours.init, jax.random.key(0), z, t, t, jnp.zeros(1, jnp.int32))["params"]
    counts = [sum(a.numel() for a in part) for part in (network.parameters(), embedding)]
    assert counts == [55_929_347, 525_312]
    own = Condition(512, 0, "t,t-r").init(jax.random.key(0), t, t, jnp.zeros(1, jnp.int32))
    size = sum(a.size for a in jax.tree.leaves(found))
    assert size - sum(a.size for a in jax.tree.leaves(own)) == counts[0] - counts[1]
