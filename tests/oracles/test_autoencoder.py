"""Our autoencoders against torch: `make oracles` runs this, plain pytest does not."""

import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import unflatten_dict

from pipelines.pretrained import Pretrained, load_autoencoder
from tests.conftest import THOROUGH, thorough
from tests.oracles import torch_models as oracle

SIZES = [(64, 64), (64, 96)]


@jax.jit
def ours(autoencoder, picture):
    """The same numbers as `oracle.outputs`; compiled once for all files of one network."""
    moments, network = autoencoder.moments(picture), autoencoder.decode.func.network
    found = {"latents": moments}
    if hasattr(network, "norm_num_groups"):
        mean, std = jnp.split(moments, 2, axis=-1)
        found = {"mean": mean, "log_variance": 2 * jnp.log(std)}
    variables = {"params": autoencoder.decode.args[0]}
    z = next(iter(found.values()))
    found["reconstruction"] = network.apply(variables, z, method="decode")
    return found


def distances(loaded: Pretrained, picture, expected) -> dict[str, float]:
    """The largest difference of each output, and that nothing about it is trivial."""
    found = ours(loaded.autoencoder, picture)
    assert found.keys() == expected.keys()
    assert all(0.1 < value.std() < 100 for value in expected.values())
    return {name: float(abs(found[name] - expected[name]).max()) for name in expected}


def assert_equal(loaded: Pretrained, module, sizes=SIZES, within=1e-4) -> None:
    for height, width in sizes:
        picture = oracle.pictures(2, height, width)
        found = distances(loaded, picture, oracle.outputs(module, picture))
        print(f"{height}×{width}:", found)
        assert max(found.values()) < within


def old_attention(state: dict, convolutions: bool) -> dict:
    """The names that diffusers gave before 0.18, and the 1×1 convolutions before that."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        old = name
        for new, word in words.items():
            old = old.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        square = convolutions and old != name and value.ndim == 2
        renamed[old] = value[:, :, None, None] if square else value
    assert renamed.keys() != state.keys()
    return renamed


def flax_tree(state: dict) -> dict:
    """What FlaxAutoencoderKL.save_pretrained wrote: its tree of the same parameters."""
    flat = {}
    for name, value in old_attention(state, convolutions=False).items():
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        order = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]
        flat[(*path, leaf)] = np.ascontiguousarray(value.transpose(order))
    return unflatten_dict(flat)


@pytest.fixture(scope="module")
def sd_vae():
    return oracle.kl(oracle.SD_VAE)


@pytest.fixture(scope="module")
def sd_folder(sd_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd_vae")
    sd_vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd_loaded(sd_folder):
    return load_autoencoder(str(sd_folder))


def count(loaded: Pretrained) -> int:
    """Parameters, without the scale's numbers."""
    halves = (loaded.autoencoder.moments.args[0], loaded.autoencoder.decode.args[0])
    return sum(leaf.size for leaf in jax.tree.leaves(halves))


def test_the_stable_diffusion_vae(sd_vae, sd_folder, sd_loaded):
    """All of its tensors are used (a file with one more or less does not load)."""
    names = safetensors.numpy.load_file(sd_folder / "diffusion_pytorch_model.safetensors").keys()
    assert len(names) == 248
    assert count(sd_loaded) == 83_653_863
    assert_equal(sd_loaded, sd_vae)


@pytest.mark.parametrize("convolutions", [False, True] if THOROUGH else [True])
def test_a_file_with_old_names(convolutions, sd_vae, sd_folder, sd_loaded, tmp_path):
    state = old_attention(oracle.numpy_state(sd_vae), convolutions)
    safetensors.numpy.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((sd_folder / "config.json").read_text())
    del config["scaling_factor"]  # as in files of that age
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.fingerprint == sd_loaded.fingerprint
    assert_equal(loaded, sd_vae, SIZES[:1])


@thorough
def test_a_flax_file(sd_vae, sd_folder, sd_loaded, tmp_path):
    tree = flax_tree(oracle.numpy_state(sd_vae))
    path = tmp_path / "diffusion_flax_model.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    config = json.loads((sd_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "FlaxAutoencoderKL"}))
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.fingerprint == sd_loaded.fingerprint
    assert_equal(loaded, sd_vae, SIZES[:1])


@thorough
def test_a_bfloat16_file(sd_vae, sd_loaded, tmp_path):
    """Against torch with the same rounded weights, computing in float32."""
    rounded = oracle.kl(oracle.SD_VAE).bfloat16()
    rounded.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.fingerprint != sd_loaded.fingerprint
    assert_equal(loaded, rounded.float(), SIZES[:1])


@thorough
def test_computing_in_bfloat16(sd_vae, sd_folder):
    """Within a few parts in a hundred of float32, as torch's own bfloat16 is."""
    loaded = load_autoencoder(str(sd_folder), dtype="bfloat16")
    picture = oracle.pictures(2, 64, 64)
    expected = oracle.outputs(sd_vae, picture)
    found = ours(loaded.autoencoder, picture)
    for name, value in expected.items():
        assert 1e-4 < np.std(found[name] - value) / np.std(value) < 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
        {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3], "latents_std": [1.0, 2.0, 3.0]},
        {"layers_per_block": 3},
        {
            "block_out_channels": [8, 16, 12],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
    ],
)
def test_other_configs(changes, tmp_path):
    module = oracle.kl(oracle.SMALL_KL | changes, seed=2)
    module.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert_equal(loaded, module, [(32, 48)])
    assert_scale(loaded, module.config)


def assert_scale(loaded: Pretrained, config) -> None:
    """The scale as diffusers' pipelines apply it: (z − mean) · scaling / std."""
    random = np.random.default_rng(0)
    mean = random.standard_normal((2, 4, 4, config.latent_channels), np.float32)
    moments = np.concatenate([mean, 0 * mean], axis=-1)
    shift = config.latents_mean or [config.shift_factor or 0.0]
    expected = (mean - shift) * config.scaling_factor / (config.latents_std or [1.0])
    keys = jax.random.split(jax.random.key(0), 2)
    found = loaded.autoencoder.sample(jnp.asarray(moments), keys)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"latent_channels": 16}, oracle.SMALL_TINY])
def test_the_tiny_autoencoder(config, tmp_path):
    module = oracle.tiny(config)
    module.save_pretrained(tmp_path)
    assert_equal(load_autoencoder(str(tmp_path)), module, [(64, 96)])


def test_taef2_with_random_weights(tmp_path):
    module = oracle.small_taef2(seed=3)
    module.save(tmp_path)
    assert_equal(load_autoencoder(str(tmp_path)), module, [(64, 96)])


def test_taef2_with_its_own_weights(shared):
    module = oracle.Taef2()
    for half in ("encoder", "decoder"):
        with np.load(shared / "weights" / f"taef2_{half}_fp16.npz") as file:
            state = {name: torch.from_numpy(file[name]).float() for name in file.files}
        getattr(module, half).load_state_dict(state)  # strict: none missing, none left over
    module.eval().requires_grad_(False)
    assert_equal(load_autoencoder(str(shared / "weights")), module, [(64, 96)])
