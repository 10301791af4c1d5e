"""Autoencoders: parity with torch's stored outputs, scale and range, files and what is wrong there.

`tests/oracles` wrote the cases in tests/data, and holds the parity at full size.
"""

import io
import json
import pathlib
import shutil
import threading
import zipfile

import flax
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from models import autoencoder
from pipelines import pretrained
from pipelines.pretrained import copy_autoencoder, load_autoencoder
from tests.conftest import thorough
from utils.cli import UserError
from utils.sharding import make_mesh

DATA = pathlib.Path(__file__).parent / "data"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CASES = ["kl", "kl_shifted", "tiny", "taef2"]


class Case:
    """A stored case: config (None for the original TAESD), weights by torch's names, outputs."""

    def __init__(self, name: str):
        """Reads tests/data."""
        path = DATA / f"autoencoder_{name}.safetensors"
        arrays = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, "numpy") as file:
            config = (file.metadata() or {}).get("config")
        self.config = config and json.loads(config)
        prefix = "weights/"
        self.weights = {k.removeprefix(prefix): v for k, v in arrays.items() if prefix in k}
        self.outputs = {k: v for k, v in arrays.items() if prefix not in k}
        self.picture = self.outputs.pop("picture")

    def write(self, folder: pathlib.Path, weights: dict | None = None, **changes) -> str:
        """Writes the folder as diffusers does (the original TAESD: its pair); `changes` of config.

        A change to None takes the key away.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.weights if weights is None else weights
        if self.config is None:
            for half in ("encoder", "decoder"):
                own = {k.removeprefix(f"{half}."): v for k, v in weights.items() if half in k}
                safetensors.numpy.save_file(own, folder / f"taef2_{half}.safetensors")
            return str(folder)
        config = {k: v for k, v in (self.config | changes).items() if v is not None}
        (folder / CONFIG).write_text(json.dumps(config))
        safetensors.numpy.save_file(weights, folder / WEIGHTS)
        return str(folder)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: Case(name) for name in CASES}


@pytest.fixture
def kl(cases) -> Case:
    return cases["kl"]


@pytest.fixture
def tiny(cases) -> Case:
    return cases["tiny"]


def raw_decode(codec: autoencoder.Autoencoder, z: np.ndarray) -> jax.Array:
    """The network's own output for raw latents, not yet uint8."""
    variables = {"params": codec.decode.args[0]}
    return codec.decode.func.network.apply(variables, jnp.asarray(z), method="decode")


def latents(case: Case) -> np.ndarray:
    return case.outputs["mean" if "mean" in case.outputs else "latents"]


def keys(n: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), n)


# Parity


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_torchs(name, cases, tmp_path):
    case = cases[name]
    codec = load_autoencoder(case.write(tmp_path)).autoencoder
    moments = np.asarray(codec.moments(jnp.asarray(case.picture)))
    assert moments.dtype == np.float32
    expected = latents(case)
    if "mean" in case.outputs:
        std = np.exp(0.5 * case.outputs["log_variance"])
        expected = np.concatenate([expected, std], axis=-1)
    np.testing.assert_allclose(moments, expected, atol=2e-5)
    found = raw_decode(codec, latents(case))
    np.testing.assert_allclose(found, case.outputs["reconstruction"], atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_decode_undoes_the_scale_and_makes_uint8(name, cases, tmp_path):
    case = cases[name]
    codec = load_autoencoder(case.write(tmp_path)).autoencoder
    z = latents(case)
    moments = np.concatenate([z, np.zeros_like(z)], -1) if "mean" in case.outputs else z
    x = codec.sample(jnp.asarray(moments), keys(len(z)))
    decoded = np.asarray(codec.decode(x))
    y = case.outputs["reconstruction"]
    expected = np.clip(np.trunc(127.5 * y + 128), 0, 255).astype(np.uint8)
    assert decoded.dtype == np.uint8
    assert np.mean((y > -1) & (y < 1)) > 0.1  # so that not all of it is clipped
    different = decoded.astype(int) - expected
    assert np.mean(different != 0) < 1e-3  # a value on the edge between two
    assert abs(different).max() <= 1


@pytest.mark.parametrize("name", ["kl", "taef2"])
def test_bfloat16_computes_nearly_the_same(name, cases, tmp_path):
    case = cases[name]
    codec = load_autoencoder(case.write(tmp_path), dtype="bfloat16").autoencoder
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(codec))
    z, y = latents(case), case.outputs["reconstruction"]
    moments = np.asarray(codec.moments(jnp.asarray(case.picture)))
    decoded = np.asarray(raw_decode(codec, z))
    assert moments.dtype == decoded.dtype == np.float32
    for found, expected in ((moments[..., : z.shape[-1]], z), (decoded, y)):
        assert 1e-5 < np.std(found - expected) / np.std(expected) < 0.03


# Scale and range


@pytest.mark.parametrize(
    ("changes", "shift", "factor"),
    [
        ({}, 0, 0.18215),
        ({"scaling_factor": None}, 0, 0.18215),  # older configs lack it
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, 0.25, 0.5),
        ({"latents_mean": [1, 2, 3], "latents_std": [1, 2, 4]}, [1, 2, 3], [1, 0.5, 0.25]),
        ({"latents_mean": [1, 2, 3], "shift_factor": 9}, [1, 2, 3], 0.18215),
    ],
)
def test_the_scale_is_the_configs(changes, shift, factor, kl, tmp_path):
    if "latents_std" in changes:
        changes = changes | {"scaling_factor": 1.0}
    codec = load_autoencoder(kl.write(tmp_path, **changes)).autoencoder
    z = kl.outputs["mean"]
    moments = np.concatenate([z, np.zeros_like(z)], -1)
    x = codec.sample(jnp.asarray(moments, jnp.float32), keys(len(z)))
    np.testing.assert_allclose(x, (z - np.asarray(shift)) * np.asarray(factor), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "shift", "factor"),
    [({}, 0, 1), ({"scaling_factor": 2.0, "shift_factor": 0.5}, 0.5, 2)],
)
def test_the_tiny_ones_scale(changes, shift, factor, tiny, tmp_path):
    codec = load_autoencoder(tiny.write(tmp_path, **changes)).autoencoder
    z = tiny.outputs["latents"]
    x = codec.sample(jnp.asarray(z), keys(len(z)))
    np.testing.assert_allclose(x, (z - shift) * factor, rtol=1e-6)


def test_samples_are_the_posteriors(kl, tmp_path):
    """Mean and deviation as stored, every key its own draw, from any float type."""
    codec = load_autoencoder(kl.write(tmp_path, scaling_factor=0.5, shift_factor=1.0)).autoencoder
    n = 4000
    moments = np.broadcast_to(np.float32([2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), (n, 2, 2, 6))
    x = np.asarray(codec.sample(jnp.asarray(moments, jnp.float16), keys(n)))
    assert x.dtype == np.float32
    assert x.shape == (n, 2, 2, 3)
    np.testing.assert_allclose(x.mean((0, 1, 2)), [0.5, -1.0, -0.5], atol=0.03)
    np.testing.assert_allclose(x.std((0, 1, 2)), [0.25, 0.5, 1.0], rtol=0.03)
    assert len(np.unique(x)) > 0.9 * x.size
    again = codec.sample(jnp.asarray(moments[:3], jnp.bfloat16), keys(n)[:3])
    np.testing.assert_allclose(again, x[:3], rtol=1e-6)  # of the key, whatever the batch


def test_the_log_variance_is_clipped(kl, tmp_path):
    weights = kl.weights | {"quant_conv.bias": np.float32([0, 0, 0, 90, -90, 0])}
    codec = load_autoencoder(kl.write(tmp_path, weights)).autoencoder
    std = np.asarray(codec.moments(jnp.asarray(kl.picture)))[..., 3:]
    np.testing.assert_allclose(std[..., 0], np.exp(10), rtol=1e-5)
    np.testing.assert_allclose(std[..., 1], np.exp(-15), rtol=1e-5)


def test_pixels_come_back_as_they_were():
    picture = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    codec = autoencoder.pixels()
    moments = codec.moments(picture)
    assert moments.dtype == jnp.uint8
    x = codec.sample(moments, keys(1))
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert (codec.decode(x) == picture).all()


# As values


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_other_parameters_compile_nothing(name, cases, tmp_path):
    case, count = cases[name], 0

    @jax.jit
    def reconstruct(codec, picture):
        nonlocal count
        count += 1
        moments = codec.moments(picture)
        return codec.decode(codec.sample(moments, keys(len(picture))))

    first = load_autoencoder(case.write(tmp_path / "a", scaling_factor=0.3)).autoencoder
    other = {key: np.float32(1.1) * value for key, value in case.weights.items()}
    second = load_autoencoder(case.write(tmp_path / "b", other, scaling_factor=0.4)).autoencoder
    results = [reconstruct(codec, jnp.asarray(case.picture)) for codec in (first, second)]
    assert count == 1
    assert (results[0] != results[1]).any()
    sliced = load_autoencoder(str(tmp_path / "a"), slice_size=1).autoencoder
    reconstruct(sliced, jnp.asarray(case.picture))
    assert count == 2


def test_pixels_and_points_are_arguments_of_jit():
    picture = jnp.full((1, 2, 2, 3), 7, jnp.uint8)
    decode = jax.jit(lambda codec, x: codec.decode(codec.sample(codec.moments(x), keys(1))))
    assert (decode(autoencoder.pixels(), picture) == picture).all()
    assert (decode(autoencoder.points(), picture) == picture).all()


@pytest.mark.parametrize(
    ("n", "slice_size"), [(16, 8), (16, 3), (16, 16), (16, 99), (5, 2), (1, 1)]
)
def test_slices_decode_the_same(n, slice_size, tiny, tmp_path):
    folder = tiny.write(tmp_path)
    x = np.random.default_rng(0).standard_normal((n, 2, 3, 5), np.float32)
    whole = jax.jit(load_autoencoder(folder).autoencoder.decode)(x)
    decode = jax.jit(load_autoencoder(folder, slice_size=slice_size).autoencoder.decode)
    assert abs(np.asarray(decode(x)).astype(int) - np.asarray(whole)).max() <= 1
    assert ("while" in decode.lower(x).as_text()) == (slice_size < n)


def test_decoding_on_eight_devices(kl, tmp_path):
    """Equal to one device's, the batch stays spread, and slices move no latents between devices."""
    mesh = make_mesh()
    assert mesh.size == 8
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = np.random.default_rng(0).standard_normal((32, 2, 3, 3), np.float32)
    codec = load_autoencoder(kl.write(tmp_path), slice_size=16).autoencoder
    decode = jax.jit(lambda codec, x: codec.decode(x), out_shardings=spread)
    codec = jax.device_put(codec, NamedSharding(mesh, PartitionSpec()))
    compiled = decode.lower(codec, jax.device_put(x, spread)).compile()
    operations = {word.split("(")[0] for word in compiled.as_text().split()}
    assert "while" in operations
    assert not {"all-gather", "all-reduce", "all-to-all", "collective-permute"} & operations
    found = compiled(codec, jax.device_put(x, spread))
    expected = load_autoencoder(str(tmp_path)).autoencoder.decode(jnp.asarray(x))
    assert abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


# Files


def old_names(weights: dict, convolutions: bool) -> dict:
    """As diffusers named attention before 0.18; before that its matrices were convolutions."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, value in weights.items():
        old = name
        for new, word in words.items():
            old = old.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        square = convolutions and old != name and value.ndim == 2
        found[old] = value[:, :, None, None] if square else value
    assert found.keys() != weights.keys()
    return found


def write_flax(folder: pathlib.Path, case: Case) -> str:
    """What the Flax class of diffusers wrote."""
    flat = {}
    for name, value in old_names(case.weights, convolutions=False).items():
        words: list[str] = []
        for word in name.split("."):
            words[len(words) - word.isdigit() :] = [
                f"{words[-1]}_{word}" if word.isdigit() else word
            ]
        if words[-1] == "weight":
            words[-1] = "kernel" if value.ndim > 1 else "scale"
        order = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]
        flat[tuple(words)] = np.ascontiguousarray(value.transpose(order))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(case.config | {"_class_name": "FlaxAutoencoderKL"}))
    tree = flax.serialization.msgpack_serialize(unflatten_dict(flat))
    (folder / "diffusion_flax_model.msgpack").write_bytes(tree)
    return str(folder)


def halves(weights: dict) -> dict[str, dict]:
    """Diffusers' names of a tiny autoencoder → the original's, whose decoder counts its clamp."""
    found: dict[str, dict] = {"encoder": {}, "decoder": {}}
    for name, value in weights.items():
        half, _, place, rest = name.split(".", 3)
        found[half][f"{int(place) + (half == 'decoder')}.{rest}"] = value
    return found


def test_one_fingerprint_for_all_forms_of_the_same_weights(kl, tmp_path):
    prints = {
        load_autoencoder(folder).fingerprint
        for folder in (
            kl.write(tmp_path / "new"),
            kl.write(tmp_path / "old", old_names(kl.weights, convolutions=False)),
            kl.write(tmp_path / "older", old_names(kl.weights, convolutions=True)),
            kl.write(tmp_path / "unscaled", scaling_factor=None),
            write_flax(tmp_path / "flax", kl),
            kl.write(tmp_path / "pipeline" / "vae") and str(tmp_path / "pipeline"),
        )
    }
    assert len(prints) == 1
    assert all(len(p) == 12 and int(p, 16) >= 0 for p in prints)
    assert load_autoencoder(str(tmp_path / "pipeline")).folder == tmp_path / "pipeline" / "vae"


def test_other_numbers_have_another_fingerprint(kl, tmp_path):
    moved = kl.weights | {"quant_conv.bias": kl.weights["quant_conv.bias"] + np.float32(1e-3)}
    folders = [
        kl.write(tmp_path / "a"),
        kl.write(tmp_path / "b", moved),
        kl.write(tmp_path / "c", scaling_factor=0.13025),
        kl.write(tmp_path / "d", shift_factor=0.1),
        kl.write(tmp_path / "e", norm_num_groups=2),
    ]
    assert len({load_autoencoder(folder).fingerprint for folder in folders}) == len(folders)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_the_size(dtype, kl, tmp_path):
    half = {name: value.astype(np.dtype(dtype)) for name, value in kl.weights.items()}
    single = {name: value.astype(np.float32) for name, value in half.items()}
    expected = load_autoencoder(kl.write(tmp_path / "single", single)).fingerprint
    folder = tmp_path / "half"
    assert load_autoencoder(kl.write(folder, half)).fingerprint == expected
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    assert load_autoencoder(str(folder)).fingerprint == expected


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_the_original_files_of_a_tiny_one(kind, tiny, tmp_path):
    expected = load_autoencoder(tiny.write(tmp_path / "diffusers")).fingerprint
    for half, weights in halves(tiny.weights).items():
        if kind == "npz":
            np.savez(tmp_path / f"taesd_{half}.npz", **weights)
        else:
            safetensors.numpy.save_file(weights, tmp_path / f"taesd_{half}.safetensors")
    assert load_autoencoder(str(tmp_path)).fingerprint == expected


def test_pools_in_diffusers_form(cases, tmp_path):
    """TAEF2's blocks under diffusers' names: found by name, as no config tells of them."""
    expected = load_autoencoder(cases["taef2"].write(tmp_path / "original")).fingerprint
    weights = {}
    for name, value in cases["taef2"].weights.items():
        half, place, rest = name.split(".", 2)
        weights[f"{half}.layers.{int(place) - (half == 'decoder')}.{rest}"] = value
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 6}
    config |= {f"{half}_block_out_channels": [8] * 4 for half in ("encoder", "decoder")}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, tmp_path / WEIGHTS)
    assert load_autoencoder(str(tmp_path)).fingerprint == expected


# The hub


def test_a_name_on_the_hub(kl, tmp_path, monkeypatch):
    """Asks for the config and one file of weights, the next only where that is not there."""
    asked, snapshot = [], pathlib.Path(write_flax(tmp_path / "snapshot", kl))

    def download(name, allow_patterns):
        asked.append((name, [p for p in allow_patterns if "/" not in p]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_autoencoder("someone/vae").folder == snapshot
    assert [patterns[1] for _, patterns in asked] == list(pretrained.WEIGHTS)
    kl.write(tmp_path / "someone" / "vae")  # a folder that exists wins
    assert load_autoencoder("someone/vae").folder == pathlib.Path("someone/vae")
    assert len(asked) == len(pretrained.WEIGHTS)


def test_a_name_that_cannot_be_had(monkeypatch, tmp_path):
    """The hub's library is offline in tests."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = complaint("someone/no-such-vae")
    assert "no folder someone/no-such-vae" in message
    assert WEIGHTS in message
    assert "stabilityai/sd-vae-ft-mse" in message


# What is wrong, in one line


def complaint(name, **options) -> str:
    with pytest.raises(UserError) as error:
        load_autoencoder(str(name), **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_folder(tmp_path):
    message = complaint(tmp_path / "none")
    assert f"no folder {tmp_path / 'none'}" in message
    assert CONFIG in message
    assert "no autoencoder given" in complaint("")


def test_wrong_options(kl, tmp_path):
    folder = kl.write(tmp_path)
    assert "float32 or bfloat16" in complaint(folder, dtype="float16")
    assert "slice_size=-1" in complaint(folder, slice_size=-1)


def test_folders_that_lack_something(kl, tmp_path):
    kl.write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model.safetensors")
    message = complaint(tmp_path)
    assert WEIGHTS in message
    assert "it holds config.json, model.safetensors" in message
    (tmp_path / CONFIG).unlink()
    message = complaint(tmp_path)
    assert "no config.json; it holds model.safetensors" in message
    (tmp_path / "model.safetensors").unlink()
    assert "it holds nothing" in complaint(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert_them(kl, tmp_path):
    kl.write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    message = complaint(tmp_path)
    assert "pickle" in message
    assert f"from_pretrained('{tmp_path}'" in message
    assert "safe_serialization=True" in message
    (tmp_path / CONFIG).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").rename(tmp_path / "vae.ckpt")
    assert f"from_single_file('{tmp_path / 'vae.ckpt'}')" in complaint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00"])
def test_configs_that_are_none(text, kl, tmp_path):
    kl.write(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    assert f"{tmp_path / CONFIG} is not" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "UNet2DModel"}, "is of UNet2DModel"),
        ({"_class_name": None}, "is of None"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types="),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types="),
        ({"latent_channels": "3"}, "latent_channels='3'"),
        ({"block_out_channels": []}, "block_out_channels=[]"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"use_quant_conv": 1}, "use_quant_conv=1"),
        ({"norm_num_groups": 3}, "describes no network"),
        ({"scaling_factor": 0}, "must not be 0"),
        ({"scaling_factor": "large"}, "scaling_factor='large'"),
        ({"latents_mean": [1.0, 2.0]}, "latents_mean=[1.0, 2.0]: expected 3"),
        ({"latents_std": [1.0, 0.0, 1.0]}, "must not be 0"),
    ],
)
def test_configs_of_something_else(changes, told, kl, tmp_path):
    kl.write(tmp_path, **changes)
    message = complaint(tmp_path)
    assert told in message
    assert str(tmp_path / CONFIG) in message


def test_other_latent_channels_than_the_weights(kl, tiny, tmp_path):
    for case, held in ((kl, 3), (tiny, 5)):
        folder = case.write(tmp_path / str(held), latent_channels=8)
        assert f"latent_channels=8, but the weights in {WEIGHTS} have {held}" in complaint(folder)


def test_tensors_that_do_not_fit(kl, tiny, tmp_path):
    message = complaint(kl.write(tmp_path, block_out_channels=[8, 32]))
    assert "tensors have other shapes, first decoder." in message
    lacking = {k: v for k, v in kl.weights.items() if "quant_conv" not in k}
    message = complaint(kl.write(tmp_path, lacking))
    assert f"lacks 4 of the {len(kl.weights)} tensors" in message
    assert "first post_quant_conv.bias" in message
    assert "first encoder.mid_block.attentions.0.to_out.0.bias" in complaint(
        kl.write(
            tmp_path,
            {k: v for k, v in kl.weights.items() if "encoder" not in k or "to_out" not in k},
        )
    )
    extra = kl.weights | {"step": np.zeros(1, np.float32)}
    assert "has left over 1 of" in (message := complaint(kl.write(tmp_path, extra)))
    assert "first step" in message
    message = complaint(tiny.write(tmp_path, num_encoder_blocks=[1, 2]))
    assert "describes no network" in message
    assert "lacks" in complaint(tiny.write(tmp_path, num_encoder_blocks=[1, 2, 2]))


def test_weights_that_are_no_floats(kl, tmp_path):
    integer = kl.weights | {"quant_conv.bias": np.zeros(6, np.int8)}
    assert "quant_conv.bias is int8" in complaint(kl.write(tmp_path, integer))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "npz"])
def test_files_cut_short(kind, share, kl, tiny, tmp_path):
    if kind == "npz":
        for half, weights in halves(tiny.weights).items():
            np.savez(tmp_path / f"taesd_{half}.npz", **weights)
        path = tmp_path / "taesd_decoder.npz"
    elif kind == "msgpack":
        path = pathlib.Path(write_flax(tmp_path, kl)) / "diffusion_flax_model.msgpack"
    else:
        path = pathlib.Path(kl.write(tmp_path)) / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert f"{path} is cut short or damaged" in complaint(tmp_path)


def test_a_npz_with_damage_inside(tiny, tmp_path):
    for half, weights in halves(tiny.weights).items():
        np.savez(tmp_path / f"taesd_{half}.npz", **weights)
    path = tmp_path / "taesd_encoder.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert f"{path} is cut short or damaged" in complaint(tmp_path)


def test_a_msgpack_of_something_else(kl, tmp_path):
    path = pathlib.Path(write_flax(tmp_path, kl)) / "diffusion_flax_model.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize({"encoder": "text"}))
    assert "lacks" in complaint(tmp_path)
    path.write_bytes(flax.serialization.msgpack_serialize([1, 2]))
    assert f"{path} is cut short or damaged" in complaint(tmp_path)


def test_pairs_that_are_none(cases, tmp_path):
    folder = pathlib.Path(cases["taef2"].write(tmp_path))
    encoder = folder / "taef2_encoder.safetensors"
    shutil.copy(encoder, folder / "taesd_encoder.safetensors")
    assert "leave one tae*_encoder* and its tae*_decoder*" in complaint(folder)
    encoder.unlink()
    assert "holds taesd_encoder.safetensors, taef2_decoder.safetensors" in complaint(folder)
    (folder / "taef2_decoder.safetensors").unlink()
    assert "leave one tae*_encoder*" in complaint(folder)
    for half in ("encoder", "decoder"):
        shutil.copy(DATA / "autoencoder_kl.safetensors", folder / f"taesd_{half}.safetensors")
    assert "no layers of a TAESD network" in complaint(folder)


# Copies


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["kl", "taef2"])
def test_a_copy_holds_what_is_read_and_nothing_else(name, cases, tmp_path):
    folder = pathlib.Path(cases[name].write(tmp_path / "from"))
    wanted = files(folder)
    (folder / "README.md").write_text("not read")
    (folder / "large.ckpt").write_bytes(b"not read")
    for _ in range(2):  # the second finds it there
        copy_autoencoder(folder, tmp_path / "out" / "autoencoder")
        assert files(tmp_path / "out" / "autoencoder") == wanted
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["autoencoder"]
    copied = load_autoencoder(str(tmp_path / "out" / "autoencoder")).fingerprint
    assert copied == load_autoencoder(str(folder)).fingerprint


def test_a_copy_replaces_no_other(kl, tmp_path):
    kl.write(tmp_path / "a", scaling_factor=0.1)
    kl.write(tmp_path / "b", scaling_factor=0.2)
    copy_autoencoder(tmp_path / "a", tmp_path / "out")
    with pytest.raises(UserError, match="is there and no copy of"):
        copy_autoencoder(tmp_path / "b", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "a")


def test_a_copy_that_fails_leaves_nothing(kl, tmp_path, monkeypatch):
    kl.write(tmp_path / "a")

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        copy_autoencoder(tmp_path / "a", tmp_path / "out" / "autoencoder")
    assert list((tmp_path / "out").iterdir()) == []


def test_copies_by_several_at_once(kl, tmp_path):
    folder = pathlib.Path(kl.write(tmp_path / "a"))
    errors = []

    def copy():
        try:
            copy_autoencoder(folder, tmp_path / "out" / "autoencoder")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=copy) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files(tmp_path / "out" / "autoencoder") == files(folder)
    assert len(list((tmp_path / "out").iterdir())) == 1


# Real weights on real pictures


@pytest.mark.parametrize(
    ("archive", "decibels", "mean", "std"),
    [
        ("omi_faces_400_256.zip", 32.29, -0.023, 0.902),
        pytest.param("imagenet_sample_200_256.zip", 29.75, 0.023, 0.848, marks=thorough),
    ],
)
def test_real_pictures_come_back(archive, decibels, mean, std, shared):
    """The README's figures are of the first 120 pictures; 16 of them are near enough."""
    codec = load_autoencoder(str(shared / "weights")).autoencoder
    with zipfile.ZipFile(shared / "data" / archive) as file:
        names = sorted(
            n for n in file.namelist() if n.endswith((".jpg", ".jpeg", ".png", ".webp", ".JPEG"))
        )
        opened = [Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in names[:16]]
    pictures = np.stack([np.asarray(picture) for picture in opened])
    run = jax.jit(lambda codec, x: (z := codec.moments(x), codec.decode(codec.sample(z, keys(8)))))
    ratios, latents = [], []
    for i in range(0, len(pictures), 8):
        z, found = map(np.asarray, run(codec, pictures[i : i + 8]))
        error = np.mean((found / 255 - pictures[i : i + 8] / 255) ** 2, axis=(1, 2, 3))
        ratios += list(-10 * np.log10(error))
        latents.append(z)
    assert abs(np.mean(ratios) - decibels) < 0.3
    assert abs(np.mean(latents) - mean) < 0.025
    assert abs(np.std(latents) - std) < 0.025
