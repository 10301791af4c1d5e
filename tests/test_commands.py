"""The command lines as a user types them, and what they build; mistakes are in test_mistakes.py."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import pytest
from absl import flags

from configs import base
from pipelines import build, objectives
from utils import cli
from utils.cli import UserError

ROOT = pathlib.Path(__file__).parents[1]
JAX_FLOW = (
    "--dataset_name {} --wandb.name DiT-B --model.depth 12 --model.hidden_size 768 "
    "--model.patch_size {} --model.num_heads 16 --model.mlp_ratio 4 --batch_size 512 {}"
)


def config_of(line: str):
    """The config that a training command builds, by the same expansion and library."""
    argv = cli.expand(["train_flow.py", *line.split()], {"workdir", "config"})
    cli.check_keys(argv)
    values, sys_argv = flags.FlagValues(), sys.argv
    try:
        sys.argv = argv
        cli.config_flags.DEFINE_config_file("config", flag_values=values)
        assert values(argv)[1:] == []
        cli.unset_sizes(values["config"].value, argv)
        return values["config"].value
    finally:
        sys.argv = sys_argv


@pytest.mark.parametrize(
    ("dataset", "patch", "rest", "shape", "classes"),
    [
        ("imagenet256", 2, "", (32, 32, 4), 1000),
        ("celebahq256", 2, "", (32, 32, 4), 0),
        ("celebahq256", 8, "--use_stable_vae 0", (256, 256, 3), 0),
    ],
)
def test_jax_flows_commands_build_the_sizes_they_name(dataset, patch, rest, shape, classes):
    config = config_of(JAX_FLOW.format(dataset, patch, rest))
    assert config.dataset_name == dataset and config.batch_size == 512
    assert config.wandb.name == "DiT-B" and config.use_stable_vae == int(not rest)
    sizes = {"depth": 12, "hidden_size": 768, "num_heads": 16, "patch_size": patch}
    assert build.dit_sizes(config.model, shape) == sizes
    network = build.network(config, shape, classes)
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert params["patch"]["kernel"].shape == (patch**2 * shape[-1], 768)
    assert params["blocks"]["attention"]["qkv"]["kernel"].shape == (12, 768, 3 * 768)
    assert params["blocks"]["mlp"]["in"]["kernel"].shape == (12, 768, 4 * 768)
    assert ("label" in params["condition"]) == bool(classes)


def test_a_flag_wins_over_a_preset():
    config = config_of(
        "--config=configs/imagenet256.py:meanflow_xl2 --model.depth 3 --batch_size=8"
    )
    sizes = build.dit_sizes(config.model, (32, 32, 4))
    assert sizes == {"depth": 3, "hidden_size": 1152, "num_heads": 16, "patch_size": 2}
    assert config.batch_size == 8 and config.mean_flow.kappa == 0.92


def test_a_size_given_wins_over_the_sizes_of_a_preset():
    line = "--config=configs/digits.py --model.size=B/2 --model.depth=3"
    config = config_of(line)
    sizes = build.dit_sizes(config.model, (8, 8, 1))
    assert sizes == {"depth": 3, "hidden_size": 768, "num_heads": 12, "patch_size": 2}


def test_the_last_of_several_values_wins():
    """Of lists too, which config_flags would join; some keys in between have their own."""
    config = config_of(
        "--alpha_flow.transition=0,1000 --seed=1 --alpha_flow.transition 0,20 --seed=2"
    )
    assert tuple(config.alpha_flow.transition) == (0, 20) and config.seed == 2


def test_a_toy_is_a_data_set_like_others():
    config = config_of("--dataset_name two_moons --batch_size=8")
    assert config.model.name == "mlp" and config.dataset_name == "two_moons"


@pytest.mark.parametrize("variant", ["b4", "b2", "m2", "l2", "xl2", "xl2plus"])
def test_published_recipes(variant):
    config = config_of(f"--config=configs/imagenet256.py:meanflow_{variant}")
    assert objectives.mean_flow_objective(config, 1000).keywords["interval_share"] == 0.25
    assert config.holdout == 0 and config.batch_size == 256 and not config.flip
    config.objective = "mean_flow"
    expected = 2.5 if variant in ("l2", "xl2") else 2.0
    assert objectives.trained_guidance(config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("variant", "objective", "classes", "options"),
    [
        *((f"imagenet256.py:improved_{n}", "improved_mean_flow", 1000, {}) for n in ("b2", "xl2")),
        ("imagenet256.py:alpha_xl2", "alpha_flow", 1000, {"omega": 0.2, "kappa": 0.92}),
        ("celebahq256.py:shortcut_b2", "shortcut", 0, {"levels": 7, "interval_share": 0.125}),
        ("cifar10.py:meanflow", "mean_flow", 10, {"interval_share": 0.75, "p": 0.75}),
        ("cifar10.py:improved", "improved_mean_flow", 10, {}),
    ],
)
def test_recipes_name_their_objective(variant, objective, classes, options):
    config = config_of(f"--config=configs/{variant}")
    build.check_ranges(config)
    bound = objectives.average_objective(config, classes, local=8)
    assert bound.func.__name__ == objective
    assert options.items() <= bound.keywords.items()


def test_without_flags_the_embedded_digits():
    config = config_of("")
    assert config.dataset_name == "digits" and config.objective == ""


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda f: f.stem)
def test_every_config_has_the_keys_of_the_base(file):
    keys = cli.flatten(base.get_config()).keys()
    assert cli.flatten(cli.load_config(str(file))).keys() == keys


def run(line: str, cwd=ROOT) -> subprocess.CompletedProcess:
    words = [sys.executable, *line.split()]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_teaches_the_command():
    result = run("train_meanflow.py --help")
    assert "python train_meanflow.py --config=configs/mnist.py" in result.stdout
    assert result.returncode == 0
    assert "Folder of the run; default runs/DATASET/OBJECTIVE." in result.stdout
    assert "changes a key." in result.stdout


def test_a_run_from_the_command_line(tmp_path):
    line = (
        f"train_flow.py --config=configs/toy.py:two_moons --workdir={tmp_path}/run --max_steps=4 "
        "--batch_size=16 --model.hidden_size=8 --log_interval=2 --wandb.mode=offline --tensorboard "
        "--optimizer.warmup_steps=0 --deterministic"
    )
    result = run(line)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "config.json").read_text())["objective"] == "flow_matching"
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    for place in (
        "samples/steps_1_0000004.png",
        "tensorboard",
        "wandb",
        "checkpoints/4",
        "card.json",
    ):
        assert (run_dir / place).exists(), place
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    other = run(line.replace("--batch_size=16", "--batch_size=32"))
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "another run, with batch_size=16 (now 32)" in other.stderr
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    shutil.rmtree(run_dir / "checkpoints")
    nothing = run(f"eval_fid.py --workdir={run_dir} --out={tmp_path}/out --cache_dir={tmp_path}/c")
    assert nothing.returncode == 2 and "holds no checkpoint yet" in nothing.stderr
    assert len(nothing.stderr.splitlines()) == 1


class Options(NamedTuple):
    """Options of a test.

    Attributes:
      number: A number, told in a
        line and a half.
      words: Some words.
      numbers: Some numbers.
      several: Several.
      choice: One of two.
    """

    number: int = 3
    words: tuple[str, ...] = ("a",)
    numbers: tuple[float, ...] = (0.5, 2.0)
    several: Sequence[str] = ()
    choice: Literal["left", "right"] = "left"


def options_of(monkeypatch, line: str) -> Options:
    values = flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    for name in ("boolean", "integer", "float", "string", "enum", "list", "multi_string"):
        define = functools.partial(getattr(flags, f"DEFINE_{name}"), flag_values=values)
        monkeypatch.setattr(cli.flags, f"DEFINE_{name}", define)
    cli.define_flags(Options)
    assert values["number"].help == "A number, told in a line and a half."
    values(["program", *line.split()])
    return cli.read_flags(Options)


def test_options_are_flags(monkeypatch):
    assert options_of(monkeypatch, "") == Options(several=[])
    line = "--number=5 --words=b,c --numbers=1,1e-3 --several=x,y --several=z --choice=right"
    found = options_of(monkeypatch, line)
    assert found == Options(5, ("b", "c"), (1.0, 0.001), ["x,y", "z"], "right")
    with pytest.raises(UserError, match="--numbers=1,b: numbers, separated by commas"):
        options_of(monkeypatch, "--numbers=1,b")
    with pytest.raises(flags.IllegalFlagValueError, match=r"left\|right"):
        options_of(monkeypatch, "--choice=up")


def test_what_a_file_says_gives_no_orders_to_the_terminal(capsys):
    """Names of a stranger's tensors stand in messages: no escape, no turned text, one line."""
    hostile = "it asks for 'a\x1b]0;owned\x07\n b\u202e\x9b2J\udcff' → naïve"
    assert cli.report(UserError(hostile)) == 2
    told = capsys.readouterr().err
    assert told == "error: it asks for 'a?]0;owned? b??2J?' → naïve\n"
    assert cli.printable(" a\t b\r\n") == "a b"
