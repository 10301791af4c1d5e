"""Pipelines as PyTorch's diffusers opens them, against ours: the same samples of the same noise.

`make oracles` runs this, plain pytest does not. Both sides are computed in float32 on CPUs.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from pipelines.export import read_diffusers, write_diffusers
from pipelines.flow import FlowPipeline
from tests.small import write_autoencoder
from tests.test_export import leaves, random_pipeline

LABELS = np.array([3, 7, 0, 9, 1, 4, 4, 10])  # the last for none
WITHIN = 1e-4


@pytest.fixture(scope="module", autouse=True)
def code(tmp_path_factory):
    """Where diffusers puts code that it runs: a folder of this process's own; one thread runs it.

    These networks are so small that PyTorch's threads would mostly wait for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", place)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("exported")


def opened(folder: pathlib.Path, **options) -> DiffusionPipeline:
    """What a user of PyTorch gets."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SCALED = {"time_inputs": "t", "time_scale": 1000.0, "patch_size": 1}
IMPROVED = {
    **{"positions": "rope", "mlp": "swiglu", "norm": "rms", "qk_norm": True, "time_inputs": "t-r"},
    **{"conditioning": "tokens", "velocity_head": 1, "guidance_inputs": True},
}
# Objective, labels, shape, and what of `config.model` is not as usual.
NETWORKS = {
    "mean_flow": ("mean_flow", 10, (8, 8, 1), {}),
    "mean_flow of r": ("mean_flow", 0, (8, 12, 3), {"time_inputs": "t,r", "patch_size": 4}),
    "mean_flow of t-r": ("mean_flow", 10, (8, 8, 1), {"time_inputs": "t-r", "mlp_ratio": 2.55}),
    "flow_matching": ("flow_matching", 10, (8, 8, 4), {}),
    "noise": ("flow_matching", 10, (8, 8, 4), {"time_inputs": "t", "prediction": "noise"}),
    "scaled": ("flow_matching", 0, (4, 4, 1), SCALED),
    "rope": ("mean_flow", 10, (8, 8, 1), {"positions": "rope", "norm": "rms"}),
    "swiglu": ("mean_flow", 0, (8, 8, 1), {"mlp": "swiglu", "qk_norm": True}),
    "data": ("flow_matching", 10, (8, 12, 1), {"prediction": "data", "conditioning": "tokens"}),
    "all": ("improved_mean_flow", 10, (8, 8, 1), IMPROVED),
}


@functools.cache
def both(name: str, root: pathlib.Path) -> tuple[FlowPipeline, DiffusionPipeline]:
    objective, classes, shape, model = NETWORKS[name]
    ours = random_pipeline(objective, classes, shape, tuple(model.items()))
    ours.config.improved_mean_flow.omega_max = 8.0
    assert write_diffusers(ours, root / name) == []
    return ours, opened(root / name)


def noise(pipeline: FlowPipeline) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, *pipeline.shape)).astype(np.float32)


def drawn(ours: FlowPipeline, **options) -> np.ndarray:
    """Undecoded samples of ours (n, height, width, channels)."""
    labels = LABELS if ours.num_classes else np.zeros(8, int)
    draw = ours.draw(labels.astype(np.int32), noise=noise(ours), decode=False, **options)
    return np.asarray(jax.device_get(draw.samples))


def theirs(ours: FlowPipeline, pipe: DiffusionPipeline, **options) -> np.ndarray:
    """The same of the pipeline in PyTorch."""
    options |= {"class_labels": LABELS.tolist()} if ours.num_classes else {}
    latents = torch.from_numpy(noise(ours)).permute(0, 3, 1, 2)
    found = pipe(latents=latents, output_type="latent", **options).images
    return found.permute(0, 2, 3, 1).numpy()


WAYS = [
    ("mean_flow", {}, {}),
    (
        "mean_flow",
        {"steps": 3, "guidance": 2.5, "guidance_interval": (0.3, 0.8)},
        {"num_inference_steps": 3, "guidance_scale": 2.5, "guidance_interval": (0.3, 0.8)},
    ),
    ("mean_flow", {"steps": 2}, {"num_inference_steps": 2}),
    ("mean_flow of r", {"grid": (1.0, 0.7, 0.0), "steps": 2}, {"timesteps": [1, 0.7, 0]}),
    ("mean_flow of t-r", {"steps": 2}, {"num_inference_steps": 2}),
    (
        "flow_matching",
        # Ends that are times of the grid, and not the same number in float32.
        {"steps": 5, "guidance": 3.0, "guidance_interval": (0.2, 0.6)},
        {"num_inference_steps": 5, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.6)},
    ),
    (
        "flow_matching",
        {"steps": 2, "sampler": "heun"},
        {"num_inference_steps": 2, "sampler": "heun"},
    ),
    ("noise", {"steps": 4, "guidance": 2.0}, {"num_inference_steps": 4, "guidance_scale": 2.0}),
    ("scaled", {"steps": 3}, {"num_inference_steps": 3}),
    ("rope", {"steps": 2}, {"num_inference_steps": 2}),
    ("swiglu", {"steps": 2}, {"num_inference_steps": 2}),
    ("data", {"steps": 3, "guidance": 2.0}, {"num_inference_steps": 3, "guidance_scale": 2.0}),
    (
        "all",
        {"steps": 2, "guidance": 1.0},
        {"num_inference_steps": 2},
    ),
    (
        "all",
        {"steps": 2, "guidance": 3.0, "guidance_interval": (0.2, 0.6)},
        {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.6)},
    ),
]


@pytest.mark.parametrize(("name", "options", "same"), WAYS)
def test_the_same_noise_makes_the_same_samples(folder, name, options, same):
    ours, pipe = both(name, folder)
    a, b = drawn(ours, **options), theirs(ours, pipe, **same)
    assert np.abs(a - noise(ours)).std() > 0.1  # it does something
    scale = max(1, a.std())
    print(f"{name} {same}: {np.abs(a - b).max():.1e}, standard deviation {a.std():.2f}")
    assert np.abs(a - b).max() < WITHIN * scale


MISTAKES = {
    "a sign": lambda u, z, t, r, c: -u(z, t, r, c).sample,
    "the times": lambda u, z, t, r, c: u(z, r, t, c).sample,
    "r as t": lambda u, z, t, r, c: u(z, t, t, c).sample,
    "the labels": lambda u, z, t, r, c: u(z, t, r, c.flip(0)).sample,
    "the axes": lambda u, z, t, r, c: u(z.mT, t, r, c).sample.mT,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(folder, monkeypatch, mistake):
    ours, pipe = both("mean_flow", folder)
    right = pipe.transformer.forward

    class Answer:
        def __init__(self, *inputs):
            self.sample = MISTAKES[mistake](right, *inputs)

    monkeypatch.setattr(pipe.transformer, "forward", Answer)
    found = theirs(ours, pipe, num_inference_steps=2)
    assert np.abs(found - drawn(ours, steps=2)).max() > 1000 * WITHIN


def test_mnist_in_one_line(folder):
    write_diffusers(
        random_pipeline("mean_flow", 10, (28, 28, 1), (("patch_size", 4),)), folder / "m"
    )
    pipe = opened(folder / "m")
    images = pipe(height=28, width=28, num_samples=4, output_type="np").images
    assert images.shape == (4, 28, 28, 1) and 0 <= images.min() < images.max() <= 1
    assert pipe(num_samples=2).images[1].size == (28, 28)


def test_the_code_of_its_card_runs(folder, monkeypatch):
    both("mean_flow", folder)
    monkeypatch.chdir(folder)
    text = (folder / "mean_flow" / "README.md").read_text()
    space: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], space)
    assert [image.size for image in space["images"]] == [(8, 8)] * 4


def test_pictures_are_those_of_ours(folder):
    ours, pipe = both("mean_flow", folder)
    latents = torch.from_numpy(noise(ours)).permute(0, 3, 1, 2)
    pictures = ours(LABELS.astype(np.int32), noise=noise(ours))[..., 0].astype(int)
    images = pipe(LABELS.tolist(), latents=latents).images
    assert np.abs(np.stack([np.asarray(image) for image in images]) - pictures).max() <= 1
    assert pictures.std() > 20


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_are_decoded_alike(tmp_path, kind):
    if kind == "kl":
        place = write_autoencoder(tmp_path / "autoencoder")
        config = json.loads((place / "config.json").read_text())
        config |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
        (place / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.6}))
    else:
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        place = tmp_path / "autoencoder"
        torch.manual_seed(0)
        AutoencoderTiny(**widths, **blocks).save_pretrained(place)
    ours = random_pipeline("mean_flow", 10, (8, 8, 4), (), str(place))
    assert write_diffusers(ours, tmp_path / "out") == []
    pipe = opened(tmp_path / "out")
    assert isinstance(pipe.vae, AutoencoderKL if kind == "kl" else AutoencoderTiny)
    pictures = ours(LABELS.astype(np.int32), noise=noise(ours)).astype(int)
    latents = torch.from_numpy(noise(ours)).permute(0, 3, 1, 2)
    found = pipe(LABELS.tolist(), latents=latents, height=16, width=16, output_type="np").images
    assert found.shape == pictures.shape == (8, 16, 16, 3)
    difference = np.abs(np.round(255 * found) - pictures)
    print(kind, difference.max(), pictures.std())
    assert difference.max() <= 1 and pictures.std() > 5
    with pytest.raises(ValueError, match="height=8: this model makes 16×16"):
        pipe(height=8)


def test_without_an_autoencoder_there_are_latents_alone(folder):
    ours, _ = both("flow_matching", folder)
    write_diffusers(ours, folder / "latents")
    index = json.loads((folder / "latents" / "model_index.json").read_text())
    (folder / "latents" / "model_index.json").write_text(json.dumps(index | {"latents": True}))
    pipe = opened(folder / "latents")
    with pytest.raises(ValueError, match="ask for output_type='latent'"):
        pipe(num_samples=2)
    images = pipe(num_samples=2, num_inference_steps=1, output_type="latent").images
    assert images.shape == (2, 4, 8, 8)
    with_one = opened(folder / "latents", vae=AutoencoderKL(latent_channels=4))  # of one size
    assert with_one(num_inference_steps=1, height=8, output_type="np").images.shape == (1, 8, 8, 3)


def test_an_autoencoder_that_overflows_is_computed_in_float32(tmp_path):
    ours = random_pipeline(
        "mean_flow", 10, (8, 8, 4), (), str(write_autoencoder(tmp_path / "autoencoder"))
    )
    write_diffusers(ours, tmp_path / "out")
    whole, half = (opened(tmp_path / "out", dtype=d) for d in (torch.float32, torch.float16))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (pipe(3, latents=latents, output_type="pt").images for pipe in (whole, half))
    assert half.vae.config.force_upcast and half.vae.dtype == torch.float32
    assert (a - b).abs().max() < 0.02 and b.dtype == torch.float32


def test_noise_and_labels_are_the_generators(folder):
    _, pipe = both("mean_flow", folder)

    def of(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_samples": 3, "output_type": "pt"} | options
        return pipe(generator=generator, **options).images

    assert torch.equal(of(1), of(1)) and not torch.equal(of(1), of(2))
    assert torch.equal(of(1, class_labels=3), of(1, class_labels=[3, 3, 3]))
    assert not torch.equal(of(1, class_labels=3), of(1, class_labels=4))
    each = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    alone = of(6, num_samples=1, class_labels=2)
    together = pipe(2, generator=each, num_samples=3, output_type="pt").images
    assert (together[1] - alone[0]).abs().max() < WITHIN
    assert pipe(num_samples=2, return_dict=False)[0][0].size == (8, 8)


def test_classes_have_names(tmp_path):
    names = [f"digit {i}" for i in range(10)]
    write_diffusers(random_pipeline("mean_flow", 10, names=names), tmp_path / "a")
    pipe = opened(tmp_path / "a")
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (
        pipe(labels, latents=latents, output_type="pt").images
        for labels in (["digit 3", "digit 9"], [3, 9])
    )
    assert torch.equal(a, b) and pipe.get_label_ids(["digit 9", "Digit_2"]) == [9, 2]
    with pytest.raises(ValueError, match="no class 'digti 3': did you mean 'digit 3'"):
        pipe("digti 3")
    with pytest.raises(ValueError, match="no class 'cat': digit 0, digit 1"):
        pipe("cat")


def test_labels_of_any_kind(folder):
    """One for all: a number of Python, NumPy or PyTorch, or a list or an array of one."""
    _, pipe = both("mean_flow", folder)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def of(labels):
        return pipe(labels, latents=latents, output_type="latent").images

    right = of([3, 3])
    for labels in (3, np.int64(3), torch.tensor(3), np.array(3), [np.int8(3)], torch.tensor([3])):
        assert torch.equal(of(labels), right), repr(labels)
    assert torch.equal(of(np.array([3, 4])), of(range(3, 5)))
    assert not torch.equal(of((3, 4)), right)


MISUSES = {
    "no sampler 'ddim': one of": {"sampler": "ddim"},
    "class 11: from 0 to 9, or 10 for none": {"class_labels": [11]},
    "how many pictures": {"class_labels": [1, 2], "num_samples": 3},
    "class 3.7: a whole number, or a name": {"class_labels": [3.7]},
    r"class \[1, 2\]: a whole number": {"class_labels": torch.tensor([[1, 2], [3, 4]])},
    "class 0.5: a whole number": {"class_labels": np.float32(0.5)},
    "class_labels says 0": {"class_labels": []},
    "2 generators for 3 pictures": {"generator": [torch.Generator()] * 2, "num_samples": 3},
    "guidance_scale=nan: a finite number": {"guidance_scale": float("nan")},
    "guidance_scale=inf: a finite number": {"guidance_scale": float("inf")},
    "the lower first": {"guidance_interval": (0.8, 0.3)},
    r"=\(nan, 1.0\): two times": {"guidance_interval": (float("nan"), 1.0)},
    "num_inference_steps=0: a whole number, at least 1": {"num_inference_steps": 0},
    "num_inference_steps=2.5: a whole number": {"num_inference_steps": 2.5},
    r"\[1.0, 0.5, 0.5, 0.0\]: times that fall": {"timesteps": [1, 0.5, 0.5 - 1e-12, 0]},
    "times that fall from 1 to 0": {"timesteps": [1, 0.5]},
    "no output_type 'jpg'": {"output_type": "jpg"},
    "the network sees": {"latents": torch.zeros(1, 1, 4, 4)},
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_is_told(folder, message):
    _, pipe = both("mean_flow", folder)
    with pytest.raises(ValueError, match=message):
        pipe(**MISUSES[message])


def test_what_flow_matching_and_no_labels_cannot_do(folder):
    _, flow = both("flow_matching", folder)
    with pytest.raises(ValueError, match="sampler meanflow needs a network of MeanFlow"):
        flow(sampler="meanflow")
    _, unlabelled = both("mean_flow of r", folder)
    with pytest.raises(ValueError, match="the network knows no labels, use 1"):
        unlabelled(guidance_scale=2)
    with pytest.raises(ValueError, match="class_labels were given, and the network knows none"):
        unlabelled(class_labels=3)


def test_what_other_objectives_cannot_do(folder):
    _, told = both("all", folder)
    with pytest.raises(ValueError, match=r"guidance_scale=0\.5: the network was told 1 and above"):
        told(guidance_scale=0.5)
    ours = random_pipeline("consistency", 10)
    write_diffusers(ours, folder / "consistency")
    pipe = opened(folder / "consistency")
    assert np.abs(drawn(ours, steps=1) - theirs(ours, pipe)).max() < WITHIN
    with pytest.raises(ValueError, match="consistency training teaches one step"):
        pipe(num_inference_steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, dtype):
    ours, _ = both("mean_flow", folder)
    pipe = opened(folder / "mean_flow").to(dtype)
    assert pipe.transformer.dtype == dtype
    found, right = theirs(ours, pipe), drawn(ours)
    error = np.abs(found - right).max() / right.std()
    print(dtype, error)
    assert found.dtype == np.float32 and error < (0.01 if dtype == torch.float16 else 0.1)


def test_saved_by_pytorch_it_opens_again_and_comes_back_to_jax(folder, tmp_path):
    ours, pipe = both("flow_matching", folder)
    pipe.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert np.array_equal(*(theirs(ours, p, num_inference_steps=1) for p in (again, pipe)))
    config, card, params = read_diffusers(tmp_path / "again")
    back = FlowPipeline.build(config, card, params)
    assert leaves(back.params).keys() == leaves(ours.params).keys()
    assert all(np.array_equal(a, leaves(ours.params)[k]) for k, a in leaves(back.params).items())
    assert config.objective == "flow_matching"
    network = type(pipe.transformer).from_config(pipe.transformer.config)
    assert network.num_parameters() == sum(a.size for a in leaves(ours.params).values())
