"""Any value for any key: a command begins its work or tells what is wrong, in one line.

Overrides go the way of the command line, through `cli.parse` and `pipelines.train.train`, of which
only `fit` is left out: networks are traced, no array of one is made.
"""

import contextlib
import functools
import itertools
import math
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image

from configs import base
from pipelines import classifier, extractors, objectives, plan, train
from utils import cli
from utils.cli import UserError

KEYS = sorted(cli.flatten(base.get_config()))
GROUPS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
TOLD = (UserError, flags.Error, OSError)  # what a command tells in one line
SMALL = (  # of every run, before what is drawn: so that what is traced is traced soon
    *("--model.depth=1", "--model.hidden_size=8"),
    *("--batch_size=8", "--max_steps=9", "--optimizer.warmup_steps=0", "--sample.num=4"),
)
HEADS = ("--model.num_heads=2", "--model.unroll=1")
FILES = {
    "digits.py": ("--model.patch_size=4", *HEADS),
    "toy.py": (),
    "toy.py:spirals": (),
    "mnist.py": HEADS,  # whose data is not there
    "folder.py": ("--model.patch_size=4", "--data_dir=pictures", *HEADS),
    "imagenet256.py:meanflow_b4": ("--use_stable_vae=0", "--data_dir=pictures", *HEADS),
}
MANY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# What somebody, or some script, may have typed for a number, a list, a choice or a name.
NASTY = (
    *("", " ", "0", "-1", "1", "2", "3", "1.0", "0.5", "-0.0", "1e3", "1e400", "1e-400", "0x10"),
    *("nan", "NaN", "inf", "-inf", "None", "True", "False", "true", "no", "1_000", "٣", "½"),
    *("9" * 10, "9" * 19, "9" * 30, "-" + "9" * 19, str(2**31 - 1), str(2**31), str(2**63)),
    *("()", "[]", "{}", "1,2", "(1,2)", "[1,", "1;2", "(1,(2,3))", "(1,'a')", "0.8,0.2", "nan,1"),
    *("0,nan", "1,1e400", "'", '"', "\\", "#", "%s", "{0}", "$HOME", "~", "..", "/", "/dev/null"),
    *("a/b", "B/2", "XL/2", "t", "t,r", "t-r", "t,t", ",", "pictures", "README.md", "digits"),
    *("dit", "mlp", "uniform", "bfloat16", "cosine", "device", "host", "classifier", "inception"),
    *("å" * 3, "\u202e", "𝔘", "\n", "a\nb", "\x1b[31m", "x" * 5000, "lambda: 0", "__class__"),
    *("two_moons", "folder", "imagenet256", "mean_flow", "online", "=", "==1", "-", "--", "--flip"),
)


def printable() -> st.SearchStrategy[str]:
    """Text that a shell can pass: no zero bytes, and no halves of pairs of UTF-16."""
    return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def values() -> st.SearchStrategy[str]:
    """Values of any kind, as they are typed."""
    numbers = st.one_of(st.integers(), st.integers(-9, 99), st.floats()).map(str)
    lists = st.lists(st.one_of(numbers, st.sampled_from(NASTY)), max_size=4).map(",".join)
    return st.one_of(st.sampled_from(NASTY), numbers, lists, printable())


def misspelt() -> st.SearchStrategy[str]:
    """Keys with a letter less or more, groups, and anything else."""
    place = st.tuples(st.sampled_from(KEYS), st.integers(0, 30))
    less = place.map(lambda p: p[0][: p[1]] + p[0][p[1] + 1 :])
    more = place.map(lambda p: p[0][: p[1]] + "x" + p[0][p[1] :])
    return st.one_of(less, more, st.sampled_from(GROUPS), printable())


def overrides() -> st.SearchStrategy[list[str]]:
    """Words of a command line: keys mostly right, their values mostly not."""
    key = st.one_of(*[st.sampled_from(KEYS)] * 5, misspelt())
    forms = st.sampled_from([typed_at_once, typed_in_full, typed_apart])
    word = st.builds(lambda form, key, value: form(key, value), forms, key, values())
    return st.lists(word, min_size=1, max_size=3).map(lambda words: list(itertools.chain(*words)))


def typed_at_once(key: str, value: str) -> list[str]:
    """One word."""
    return [f"--{key}={value}"]


def typed_in_full(key: str, value: str) -> list[str]:
    """One word, as ml_collections has it."""
    return [f"--config.{key}={value}"]


def typed_apart(key: str, value: str) -> list[str]:
    """Two words, as jax-flow has it."""
    return [f"--{key}", value]


@contextlib.contextmanager
def command_line(define: Callable[[flags.FlagValues], None]) -> Iterator[flags.FlagValues]:
    """Flags of its own, in the place of the process's."""
    found, argv = flags.FlagValues(), sys.argv
    flags.DEFINE_integer("verbosity", -1, "", flag_values=found)
    define(found)
    with mock.patch.object(flags, "FLAGS", found):
        try:
            yield found
        finally:
            sys.argv = argv


def training_flags(found: flags.FlagValues) -> None:
    """Those of the training scripts."""
    config_flags.DEFINE_config_file("config", flag_values=found)
    flags.DEFINE_string("workdir", "", "", flag_values=found)


def begin(argv: list[str], make_objective: Callable) -> str:
    """How a training command begins: "trains" or "told"."""
    try:
        with command_line(training_flags) as found:
            cli.parse(["train_flow.py", *argv])
            train.train(found["config"].value, "run", make_objective)
        return "trains"
    except TOLD as error:
        assert " ".join(str(error).split())
        return "told"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[pathlib.Path]:
    """Where commands are typed, beside two pictures; nothing is fitted, fetched or classified."""
    path = tmp_path_factory.mktemp("typed")
    (path / "pictures").mkdir()
    (path / "README.md").write_text("words\n")
    for i in range(2):
        x = np.random.default_rng(i).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(x).save(path / "pictures" / f"{i}.png")

    def absent(*_, **__):
        raise UserError("is not made in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HOME", str(path))
        patch.delenv("TFDS_DATA_DIR", raising=False)
        patch.setattr(train, "fit", lambda *_, **__: types.SimpleNamespace(step=0))
        patch.setattr(extractors, "_inception_file", absent)
        patch.setattr(extractors, "_hub_file", absent)
        patch.setattr(classifier, "extractor", absent)
        yield path


@settings(MANY, max_examples=150)
@given(
    file=st.sampled_from(sorted(FILES)),
    words=overrides(),
    objective=st.sampled_from([objectives.flow_objective, objectives.mean_flow_objective]),
)
def test_any_override_trains_or_is_told(folder, file, words, objective):
    given_first = [f"--config={cli.CONFIGS}/{file}", *SMALL, *FILES[file]]
    with jax.numpy_dtype_promotion("standard"):
        begin([*given_first, *words], objective)


@pytest.mark.parametrize("file", ["digits.py", "toy.py", "folder.py"])
def test_without_overrides_it_trains(folder, file):
    """So that what is told above is told of the overrides."""
    with jax.numpy_dtype_promotion("standard"):
        assert (
            begin(
                [f"--config={cli.CONFIGS}/{file}", *SMALL, *FILES[file]], objectives.flow_objective
            )
            == "trains"
        )


# The evaluator's options.


def plan_flags(found: flags.FlagValues) -> None:
    """Those of eval_fid.py."""
    with contextlib.ExitStack() as patches:
        for kind in ("boolean", "integer", "float", "string", "enum", "list", "multi_string"):
            define = functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=found)
            patches.enter_context(mock.patch.object(cli.flags, f"DEFINE_{kind}", define))
        cli.define_flags(plan.Plan)


def options() -> st.SearchStrategy[list[str]]:
    """Words of the evaluator's command line."""
    name = st.one_of(*[st.sampled_from(plan.Plan._fields)] * 5, misspelt())
    word = st.builds(lambda name, value: f"--{name}={value}", name, values())
    return st.lists(word, min_size=1, max_size=4)


@settings(MANY, max_examples=400)
@given(words=options())
def test_any_option_makes_a_plan_or_is_told(words):
    try:
        with command_line(plan_flags):
            cli.parse(["eval_fid.py", "--workdir=run", *words])
            made = plan.checked(cli.read_flags(plan.Plan))
    except TOLD as error:
        assert " ".join(str(error).split())
        return
    assert all(1 <= steps <= plan.MOST_STEPS for steps in made.steps)
    assert all(math.isfinite(scale) for scale in made.guidance)
    assert all(0 <= low <= high <= 1 for low, high in plan.intervals(made))
    assert list(made.steps) == sorted(set(made.steps))
