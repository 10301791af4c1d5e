"""Exported folders: what is in them, the way back, their model cards, and mistakes in one line."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax.traverse_util import flatten_dict

from configs import digits
from pipelines import export, model_card
from pipelines.export import INDEX, Options, read_diffusers, write_diffusers
from pipelines.flow import FlowPipeline
from tests.small import write_autoencoder
from utils.cli import UserError
from utils.sharding import fetch

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "unroll": 1}
UNSIZED = (("patch_size", None),)  # where there are none
WEIGHTS = pathlib.Path("transformer", "diffusion_pytorch_model.safetensors")


def random_pipeline(
    objective: str,
    classes: int = 10,
    shape: tuple[int, ...] = (8, 8, 1),
    model: tuple[tuple[str, object], ...] = (),
    autoencoder: str = "",
    names: list[str] | None = None,
) -> FlowPipeline:
    """A small network of which no tensor is near zero."""
    config = digits.get_config()
    config.objective = objective
    config.model.update(SMALL | dict(model))
    config.use_stable_vae, config.autoencoder = int(bool(autoencoder)), autoencoder
    card = {"shape": list(shape), "num_classes": classes, "train_steps": 5}
    card |= {"class_names": names} if names else {}
    built = FlowPipeline.build(config, card)
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(built.network.init, jax.random.key(0))

    def draw(path, a):
        about = 1 if "norm" in jax.tree_util.keystr(path) else 0
        return (about + 0.15 * rng.normal(size=a.shape)).astype(np.float32)

    return built.with_params(jax.tree_util.tree_map_with_path(draw, abstract))


def leaves(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in flatten_dict(params, sep=".").items()}


@functools.cache
def small(objective: str = "mean_flow") -> FlowPipeline:
    return random_pipeline(objective)


# Folders


def test_files_of_a_diffusers_folder(tmp_path, monkeypatch):
    for name in ("torch", "diffusers"):  # whoever exports needs neither
        monkeypatch.setitem(sys.modules, name, None)
    assert write_diffusers(small(), tmp_path / "out") == []
    found = {str(p.relative_to(tmp_path / "out")) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        *("model_index.json", "README.md", "flow_pipeline.py", "transformer/flow_transformer.py"),
        *("transformer/config.json", str(WEIGHTS), "training/config.json", "training/card.json"),
    }
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == ["flow_pipeline", "FlowPipeline"]
    assert index["transformer"] == ["flow_transformer", "FlowTransformer2DModel"]
    assert index["vae"] == [None, None]
    with pytest.raises(UserError, match="out holds files already: name a new folder"):
        write_diffusers(small(), tmp_path / "out")


def test_no_file_is_replaced(tmp_path):
    """A run keeps its config.json, and another model its card; nothing is read before."""
    files = {tmp_path / "run" / name: name for name in ("config.json", "README.md", "log.txt")}
    (tmp_path / "run").mkdir()
    for path, text in files.items():
        path.write_text(text)
    with pytest.raises(UserError, match="run holds files already: name a new folder"):
        write_diffusers(small(), tmp_path / "run")
    for out in ("run", "run/log.txt"):  # the last is no folder
        options = Options(workdir=str(tmp_path / "run"), out=str(tmp_path / out))
        for call in (export.write, export.load):
            with pytest.raises(UserError, match=f"{out} holds files already: name a new folder"):
                call(options)
    assert {path: path.read_text() for path in tmp_path.rglob("*.*")} == files


OPTIONS = [
    ("mean_flow", 10, (8, 8, 1), {}),
    ("mean_flow", 0, (8, 12, 3), {"time_inputs": "r, t-r", "patch_size": 4, "mlp_ratio": 2.55}),
    ("flow_matching", 3, (4, 4, 4), {"time_inputs": "t", "prediction": "noise", "time_scale": 2.0}),
    ("mean_flow", 10, (8, 8, 1), {"positions": "rope", "norm": "rms", "qk_norm": True}),
    (
        "mean_flow",
        0,
        (8, 8, 1),
        {"conditioning": "tokens", "mlp": "swiglu", "guidance_inputs": True},
    ),
]


@pytest.mark.parametrize(("objective", "classes", "shape", "model"), OPTIONS)
def test_there_and_back(tmp_path, objective, classes, shape, model):
    names = ["a", "b", "c"] if classes == 3 else None
    ours = random_pipeline(objective, classes, shape, tuple(model.items()), names=names)
    write_diffusers(ours, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    transformer = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert {k: v.shape for k, v in tensors.items()} == export.torch_shapes(transformer)
    for described_by in ("training", "PyTorch"):
        if described_by == "PyTorch":  # whose save_pretrained keeps no such folder
            for file in (tmp_path / "training").iterdir():
                file.unlink()
        config, card, params = read_diffusers(tmp_path)
        assert config.objective == objective and card["num_classes"] == classes
        assert tuple(card["shape"]) == shape and card.get("class_names") == names
        back, first = leaves(params), leaves(ours.params)
        assert back.keys() == first.keys()
        assert all(back[k].dtype == np.float32 for k in back)
        assert all(np.array_equal(back[k], first[k]) for k in first)
        FlowPipeline.build(config, card, params)


def test_the_second_head_stays_behind(tmp_path):
    """What comes back is u, in a network without one."""
    model = {"velocity_head": 1, "guidance_inputs": True, "conditioning": "tokens", "norm": "rms"}
    ours = random_pipeline("improved_mean_flow", 10, (8, 8, 1), tuple(model.items()))
    write_diffusers(ours, tmp_path)
    config, card, params = read_diffusers(tmp_path)
    assert config.model.velocity_head == 0 and config.model.guidance_inputs
    back = FlowPipeline.build(config, card, params)
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    t = np.array([0.3, 1.0], np.float32)
    right = ours.velocity(z, t / 2, t, np.array([3, 10]))
    assert np.abs(right).max() > 0.1
    np.testing.assert_allclose(back.velocity(z, t / 2, t, np.array([3, 10])), right, atol=1e-5)
    drawn = fetch(ours.draw(np.array([3, 10]), noise=z, guidance=2.0, decode=False)).samples[:2]
    one = z - ours.velocity(z, 0.0, 1.0, np.array([3, 10]), guidance=2.0)
    np.testing.assert_allclose(drawn, one, atol=1e-5)
    assert np.abs(z - ours.velocity(z, 0.0, 1.0, np.array([3, 10])) - one).max() > 1e-3
    with pytest.raises(UserError, match="guide by two calls"):
        small().velocity(z, t, t, np.array([3, 10]), guidance=2.0)


def test_folders_older_than_an_option(written):
    """A transformer's config.json that knows nothing of positions, norms and so on."""
    path = written / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in export.YOUNGER}))
    params = leaves(read_diffusers(written)[2])
    assert all(np.array_equal(params[k], a) for k, a in leaves(small().params).items())


def test_layers_lie_as_torch_has_them(tmp_path):
    """By their meaning, not by the inverse: a Linear's rows are its outputs."""
    write_diffusers(small(), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    ours = leaves(small().params)
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    qkv = tensors["blocks.1.attn.qkv.weight"]
    np.testing.assert_allclose(
        x @ qkv.T, x @ ours["blocks.attention.qkv.kernel"][1], rtol=1e-4, atol=1e-6
    )
    z = np.random.default_rng(2).normal(size=(2, 2, 1)).astype(np.float32)  # a patch: h, w, c
    convolved = np.einsum("hwc,dchw->d", z, tensors["x_embedder.proj.weight"])
    np.testing.assert_allclose(convolved, z.ravel() @ ours["patch.kernel"], rtol=1e-4, atol=1e-6)


def test_half_the_size(tmp_path):
    for dtype in ("float32", "float16"):
        write_diffusers(small(), tmp_path / dtype, dtype)
    sizes = [(tmp_path / dtype / WEIGHTS).stat().st_size for dtype in ("float32", "float16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.1
    params = leaves(read_diffusers(tmp_path / "float16")[2])
    first = leaves(small().params)
    assert all(np.array_equal(params[k], first[k].astype(np.float16)) for k in first)


def test_the_autoencoder_goes_with_latents(tmp_path):
    place = write_autoencoder(tmp_path / "autoencoder")
    ours = random_pipeline("flow_matching", 3, (8, 8, 4), (), str(place))
    assert write_diffusers(ours, tmp_path / "out") == []
    config = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["scaling_factor"] == 0.18215
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 2
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["latents"] is True
    back, _, _ = read_diffusers(tmp_path / "out")
    assert back.autoencoder == str(tmp_path / "out" / "vae")
    first, second = (export.load_autoencoder(str(p)) for p in (place, back.autoencoder))
    assert first.fingerprint == second.fingerprint
    other = dataclasses.replace(ours, card=ours.card | {"autoencoder": "0123456789ab"})
    with pytest.raises(UserError, match="made by another autoencoder"):
        write_diffusers(other, tmp_path / "other")


def test_an_autoencoder_that_diffusers_does_not_know(tmp_path, shared):
    place = tmp_path / "taef2"
    place.mkdir()
    for half in ("encoder", "decoder"):
        name = f"taef2_{half}_fp16.npz"
        (place / name).symlink_to(shared / "weights" / name)
    channels = export._decoder(export.load_autoencoder(str(place))).latent_channels
    ours = random_pipeline("mean_flow", 0, (2, 2, channels), (), str(place))
    (warning,) = write_diffusers(ours, tmp_path / "out")
    assert "without it and gives output_type='latent' alone" in warning
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == [None, None] and index["latents"] is True
    assert not (tmp_path / "out" / "vae").exists()
    assert 'output_type="latent"' in (tmp_path / "out" / "README.md").read_text()


def test_the_command(tmp_path):
    run, out = ROOT / "pretrained" / "digits_mean_flow", tmp_path / "out"
    words = [f"--workdir={run}", f"--out={out}", "--licence=mit", "--dtype=float16"]
    script = [sys.executable, ROOT / "export_diffusers.py"]
    done = subprocess.run([*script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written to {out}\n"
    assert (out / INDEX).exists() and front((out / "README.md").read_text())["license"] == "mit"


def test_a_folder_for_jax(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    export.write(Options(workdir="run", out="a/out", licence="mit"))
    text = (tmp_path / "a" / "out" / "README.md").read_text()
    assert "--workdir=a/out" in text and front(text)["license"] == "mit"
    back = leaves(FlowPipeline.from_pretrained("a/out").params)
    assert all(np.array_equal(back[k], a) for k, a in leaves(small().params).items())
    with pytest.raises(UserError, match="a/out holds files already: name a new folder"):
        export.write(Options(workdir="run", out="a/out"))


# What does not fit


@pytest.fixture
def written(tmp_path) -> pathlib.Path:
    write_diffusers(small(), tmp_path / "good")
    return tmp_path / "good"


def test_tensors_that_are_missing_or_left_over(written):
    tensors = safetensors.numpy.load_file(written / WEIGHTS)
    name = "blocks.1.mlp.fc2.bias"
    without = {k: v for k, v in tensors.items() if k != name}
    for changed, message in (
        (without, f"lacks 1 of the {len(tensors)} tensors .*, first {name}"),
        (tensors | {"more": np.zeros(3)}, "has left over 1 of the .*, first more"),
        (tensors | {name: np.zeros(3)}, rf"{name} has the shape \(3,\), .* means \(32,\)"),
    ):
        safetensors.numpy.save_file(changed, written / WEIGHTS)
        with pytest.raises(UserError, match=message):
            read_diffusers(written)
    (written / WEIGHTS).write_bytes((written / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        read_diffusers(written)


def test_folders_of_something_else(written, tmp_path):
    with pytest.raises(UserError, match="nowhere is no run and no exported model"):
        read_diffusers(tmp_path / "nowhere")
    path = written / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(UserError, match="num_layers=3, but the network that was exported has 2"):
        read_diffusers(written)
    for file in (written / "training").iterdir():
        file.unlink()
    for key, value, message in (
        ("hidden_size", "wide", "describes no network of this project"),
        ("num_layers", 10**9, "is none of this project: model.depth"),
        ("time_inputs", "t,s", "a choice of t,r,t-r"),
        ("sample_size", [8], "its shape cannot be"),
        ("prediction", "x", "is none of this project: model.prediction"),
    ):
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            read_diffusers(written)
    index = written / "model_index.json"
    index.write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(UserError, match="holds a DiTPipeline, no pipeline that"):
        read_diffusers(written)


def test_networks_that_diffusers_cannot_be_given(tmp_path):
    points = random_pipeline("mean_flow", 0, (2,), (("name", "mlp"), *UNSIZED, ("num_heads", None)))
    with pytest.raises(UserError, match=r"only a DiT on pictures .* this network is of points"):
        write_diffusers(points, tmp_path)
    unet = random_pipeline("mean_flow", 10, (8, 8, 1), (("name", "unet"), ("depth", 1), *UNSIZED))
    with pytest.raises(UserError, match=r"this network is of model\.name=unet: scripts/export"):
        write_diffusers(unet, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "which run, and where to"),
        ({"out": "o"}, "which run, and where to"),
        ({"workdir": "nowhere", "out": "o"}, "is no run and no exported model"),
        ({"out": "o", "checkpoint": "all"}, "one goes out; give latest, best or its step"),
        ({"out": "o", "checkpoint": "7"}, "has no checkpoint 7: there are 5"),
        ({"out": "o", "checkpoint": "best"}, "has no best checkpoint"),
        ({"out": "o", "ema": "0.5"}, "was exported and holds one average"),
        ({"out": "gs://b/o"}, "only --workdir may be a bucket's"),
        ({"out": "o", "results": "nowhere.json"}, "is no results.json of eval_fid.py"),
    ],
)
def test_mistakes_are_told(tmp_path, options, message):
    if "out" in options and "workdir" not in options and "which" not in message:
        small().save_pretrained(tmp_path / "run")
        options = options | {"workdir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=message) as error:
        export.load(Options(**options))
    assert "\n" not in str(error.value)


# Model cards


def front(text: str) -> dict:
    """The front matter, as the hub reads it."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_trained_network():
    config = small().config
    config = type(config)(config.to_dict())
    config.mean_flow.update({"omega": 2.0, "kappa": 0.5})
    card = small().card | {
        **{"dataset": "digits 0123abcd", "parameters": 757828, "train_images": 640},
        **{"train_flops": 1.5e12, "trained_guidance": 4.0, "licence": "CC-BY-4.0"},
    }
    text = model_card.text(config, card, name="somewhere/digits")
    assert front(text) == {
        "license": "cc-by-4.0",
        "library_name": "jax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["meanflow", "image-generation", "jax", "class-conditional"],
    }
    for words in (
        *("# digits\n", "757,828 parameters", "arXiv 2505.13447", "10 classes"),
        *("`digits` (fingerprint 0123abcd)", "| batch | 128 |", "| steps | 5 |"),
        *("AdamW, β₁ 0.9, β₂ 0.95", "| images | 640 |", "| training FLOPs | 1.5e+12 |"),
        *("| EMA | 0.99 |", "ω′ = 4 (ω = 2, κ = 0.5) for t in [0, 1]", "`CC-BY-4.0`"),
        *("--workdir=somewhere/digits --labels=-1 --steps=1", "None were measured."),
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer.name": "muon"}, "Muon (β 0.95; other parameters AdamW, β₁ 0.9, β₂ 0.95)"),
        ({"optimizer.name": "adamw8bit"}, "AdamW, β₁ 0.9, β₂ 0.95, moments in 8 bits |"),
        ({"optimizer.moments": "bfloat16"}, "β₂ 0.95, moments in bfloat16 |"),
        (
            {"optimizer.schedule": "wsd", "optimizer.decay_steps": 1000},
            "wsd, to 0 over the last 1,",
        ),
        ({"model.prediction": "data"}, "| prediction | data |"),
        (
            {"model.positions": "rope", "model.mlp": "swiglu", "model.norm": "rms"},
            "patches of 2, RoPE, SwiGLU, RMS norm)",
        ),
        (
            {"model.qk_norm": True, "model.conditioning": "tokens", "model.velocity_head": 1},
            "qk-norm, in-context tokens, a second head of 1 block)",
        ),
        (
            {"model.name": "unet"},
            "A U-Net (base width 32, multipliers 1, 2, 2, blocks per resolution 2)",
        ),
        ({"model.guidance_inputs": True}, "steps=1, seed=0, guidance=2.0)"),
        ({"model.guidance_inputs": True}, "--num=16 --guidance=2.0\n"),
    ],
)
def test_a_card_says_what_is_not_the_default(changed, words):
    config = type(small().config)(small().config.to_dict())
    config.update_from_flattened_dict(changed)
    assert words in model_card.text(config, small().card)
    assert words not in model_card.text(small().config, small().card)
    if "model.guidance_inputs" in changed:
        text = model_card.text(config, small().card, library="diffusers")
        assert "class_labels=[0] * 4, guidance_scale=2.0, num_inference_steps=1" in text


STRANGE = [
    *({key: value} for key in ("licence", "origin", "ema") for value in (5, [1], {"a": 1})),
    *({key: value} for key in ("parameters", "train_flops") for value in ("9", [9], {"a": 1})),
    *({"train_images": value} for value in (float("inf"), float("nan"), 10**400, True)),
    *({"train_steps": "5"}, {"trained_guidance": "w"}, {"dataset": ["digits"]}),
    *({"class_names": names} for names in (5, "abc", [{}] * 10, {"0": "zero"})),
    *({"initialised_from": start} for start in ("x", 7, ["x"], {"train_steps": "many"})),
    *({"measured": rows} for rows in ("abc", 5, ["abc"], {"value": 1}, [[1.0]])),
    *({"measured": [{"metric": "fid", "value": value}]} for value in ("low", [1], 10**400)),
    *({"measured": [{"value": 1.0, "protocol": words}]} for words in (3, ["a"], {})),
    *({"measured": [{"value": 1.0, key: "x"}]} for key in ("deviation", "num_samples")),
    *({"measured": [{"value": 1.0, "sampling_guidance": [1]}]},),
    *({"measured": [{"value": 1.0, "deviation_of": words} for words in ("a", 3)]},),
]


@pytest.mark.parametrize("library", ["jax", "diffusers"])
def test_cards_of_strangers(tmp_path, library):
    """Whatever a card holds, there is one line or a model card, and never half a folder."""
    for strange in STRANGE:
        (key,) = strange
        card = small().card | strange
        with pytest.raises(UserError, match=f"its {key} cannot be") as error:
            model_card.text(small().config, card, library=library)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=f"its {key} cannot be"):
            write_diffusers(dataclasses.replace(small(), card=card), tmp_path)
        assert list(tmp_path.iterdir()) == []
    nothing = {key: None for strange in STRANGE for key in strange}
    odd = {"measured": [{"metric": [1], "value": float("nan"), "steps": {}, "seed": "x", "run": 3}]}
    for card in (nothing, odd, {"class_names": []}, {"measured": [{}]}):
        assert front(model_card.text(small().config, small().card | card, library=library))


def test_licences_and_places():
    for licence, expected in (
        ("", {"license": "unknown"}),
        ("mit", {"license": "mit"}),
        ('house: "rules"', {"license": "other", "license_name": 'house: "rules"'}),
    ):
        text = model_card.text(small().config, small().card | {"licence": licence})
        assert expected.items() <= front(text).items()
    place = "/".join(["", "home", "me", "model"])
    assert "home" not in model_card.text(small().config, small().card, name=place)


def test_code_of_a_card_can_be_pasted(tmp_path):
    """Names it imports are there, and it is Python."""
    text = model_card.text(small().config, small().card, name=str(tmp_path))
    code = text.split("```python\n")[1].split("```")[0]
    small().save_pretrained(tmp_path)
    space: dict = {}
    exec(code.replace(f'"{tmp_path.name}"', repr(str(tmp_path))), space)
    assert space["samples"].shape == (16, 8, 8, 1)
    diffusers = model_card.text(small().config, small().card, library="diffusers", name="a")
    compile(diffusers.split("```python\n")[1].split("```")[0], "card", "exec")
    assert front(diffusers)["library_name"] == "diffusers"


def test_metrics_carry_their_protocol(tmp_path):
    lines = [
        {"step": 3, "loss": 1.0, "fid_quick_2000/1_step": 50.0},
        {"step": 5, "self_consistency": 0.25, "fid_quick_2000/1_step": 40.0},
        {"step": 9, "fid_quick_2000/1_step": 30.0},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 10, "fi'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = model_card.measured_in_training(tmp_path, 5)
    assert {row["metric"]: row["value"] for row in found} == {"self_consistency": 0.25, "fid": 40}
    row = {"run": "mean_flow", "objective": "mean_flow", "train_steps": 5, "steps": 1}
    row |= {"metric": "fid", "value": 3.43, "num_samples": 50000, "protocol": "2015 Inception"}
    row |= {"reference": "training split of digits"}
    real = {**row, "run": "held-out split", "objective": "real data"}
    real |= {"train_steps": None, "steps": None, "value": 1.25}
    rows = [row, {**row, "run": "other", "value": 9.9}, {**row, "train_steps": 4, "value": 8.8}]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": [*rows, real]}))
    config = small().config
    by = model_card.measured_by(results, tmp_path / "a" / "mean_flow", config, small().card)
    assert [r["value"] for r in by] == [3.43, 1.25]
    averaged = small().card | {"ema": "0.99"}
    with pytest.raises(UserError, match=r"at step 5 and EMA 0\.99, only of mean_flow at step"):
        results.write_text(json.dumps({"rows": [row | {"ema": "none"}]}))
        model_card.measured_by(results, tmp_path / "mean_flow", config, averaged)
    results.write_text(json.dumps({"rows": [*rows, real]}))
    text = model_card.text(config, small().card | {"measured": found + by})
    assert "Protocol: 2015 Inception. Reference: training split of digits." in text
    assert "| mean_flow | fid | 3.43 |" in text and "9.9" not in text and "50,000" in text
    assert "quick distance drawn in training at step 5" in text
    with pytest.raises(UserError, match="holds no row of elsewhere at step 5, only of mean_flow"):
        model_card.measured_by(results, tmp_path / "elsewhere", config, small().card)


def test_options_end_in_the_card(tmp_path):
    small().save_pretrained(tmp_path / "run")
    options = Options(workdir=str(tmp_path / "run"), out=str(tmp_path / "out"), licence="mit")
    loaded = export.load(options)
    write_diffusers(loaded, options.out)
    card = json.loads((tmp_path / "out" / "training" / "card.json").read_text())
    assert card["licence"] == "mit" and card["ema"] == "0.99"
    assert front((tmp_path / "out" / "README.md").read_text())["license"] == "mit"
    again = export.load(Options(workdir=str(tmp_path / "run"), out="o"))
    assert again.card["licence"] == ""
