"""Comparisons: budgets, what is run and what is not run again, means and spreads, mistakes."""

import csv
import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import compare as plans
from pipelines import compare, compare_report, report, sweep
from pipelines.cells import Row
from pipelines.compare import Options
from pipelines.objectives import average_objective, flow_objective
from pipelines.plan import Plan
from pipelines.train import train
from tests.conftest import ROOT
from utils import cli, figures
from utils.cli import UserError
from utils.hosts import Again, Preempted

TINY = "--model.hidden_size=8 --model.depth=1 --batch_size=16 --log_interval=1 --sample.num=16 "
TINY += "--save_interval=4"
CONSTANT = "--optimizer.schedule=constant --optimizer.warmup_steps=0"
RECIPES = {
    "flow": {"objective": "flow_matching", "options": ""},
    "mean": {"objective": "mean_flow", "options": "--mean_flow.interval_share=0.5"},
    "rate": {"objective": "flow_matching", "options": "--optimizer.lr=1e-4"},
}


def plan_of(schedule="constant", **given):
    """Points in the plane, which cost nothing to train on."""
    settings = {
        "recipes": RECIPES,
        "base": "configs/toy.py:two_moons",
        "options": f"{TINY} --optimizer.schedule={schedule} --optimizer.warmup_steps=0",
        "names": "flow,mean",
        "max_steps": 12,
        "steps": (1, 4),
        "evaluation": "--num_samples=100 --batch_size=64",
    }
    return plans.plan("tiny", **settings | given)


def prepare(tmp_path, **given):
    return compare.prepare(plan_of(**given), Options(workdir=str(tmp_path / "all")))


class Fake:
    """Stands for the commands: leaves what they leave, without the work, and keeps count."""

    def __init__(self, values=lambda run, steps: 1.0):
        self.values, self.commands = values, []

    def __call__(self, command):
        self.commands.append(command)
        flags = [word.lstrip("-").partition("=")[::2] for word in command[1:]]
        given = dict(flags)
        if command[0] == "eval_fid.py":
            runs = [pathlib.Path(value) for name, value in flags if name == "workdir"]
            self.evaluate(runs, given)
        else:
            self.train(pathlib.Path(given["workdir"]), command, int(given["max_steps"]))

    def train(self, folder, command, step):
        config = compare.config_of(command[1].partition("=")[2], self.keys(command))
        config.objective = config.objective or (
            "flow_matching" if command[0] == "train_flow.py" else "mean_flow"
        )
        place = folder / "checkpoints" / str(step)
        assert not place.exists()
        place.mkdir(parents=True)
        (place / "_CHECKPOINT_METADATA").write_text(f"{len(self.commands)}")
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        (folder / "card.json").write_text(json.dumps({"dataset": self.data}))
        seed = config.seed
        lines = [{"step": s, "error": s + seed} for s in range(1, step + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    @staticmethod
    def keys(command):
        return [w for w in command[2:] if not w.startswith("--workdir=")]

    def evaluate(self, runs, given):
        about = {"metric": "distance", "protocol": "p", "reference": "r", "num_samples": 100}
        rows = [
            Row.of(**about, run=run.name, steps=s, nfe=s, sampler="euler", ema="0.9", seed=0)
            ._replace(value=self.values(run.name, s))
            ._asdict()
            for run in runs
            for s in map(int, given["steps"].split(","))
        ]
        rows.append(Row.of(**about, run="held-out split", value=0.5)._asdict())
        pathlib.Path(given["out"]).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(given["out"]) / "results.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def fake(monkeypatch):
    def install(comparison, *args):
        made = Fake(*args)
        made.data = comparison.recipes[0].data
        monkeypatch.setattr(compare, "execute", made)
        return made

    return install


# Budgets.


def test_steps_of_equal_flops_come_nearest():
    rng = np.random.default_rng(0)
    for steps, flops, other in rng.integers(1, 10**6, (200, 3)).tolist():
        found = compare.equal_flops(steps, flops, other)
        assert found == 1 or abs(found * other - steps * flops) <= other / 2
        assert found >= 1


def test_a_recipe_that_costs_more_gets_fewer_steps_of_the_same_flops(tmp_path):
    flow, mean = prepare(tmp_path, max_steps=600).recipes
    assert flow.targets == {"steps": 600, "flops": 600}
    assert mean.targets["steps"] == 600
    assert mean.targets["flops"] < 600 and flow.flops < mean.flops
    assert mean.targets["flops"] * mean.flops == pytest.approx(600 * flow.flops, rel=1 / 600)
    flow, mean = prepare(tmp_path, max_steps=600, flops_of="mean", budgets="flops").recipes
    assert mean.targets == {"flops": 600}
    assert flow.targets["flops"] * flow.flops == pytest.approx(600 * mean.flops, rel=1 / 600)


def test_one_run_serves_both_budgets_only_where_its_rate_does_not_know_the_end(tmp_path):
    flow, mean = prepare(tmp_path).trainings
    assert flow.stops == (12,) and len(mean.stops) == 2 and mean.stops[1] == 12
    first, second = compare.train_commands(mean).values()
    changed = set(first) ^ set(second)
    assert changed == {f"--max_steps={stop}" for stop in mean.stops}
    seldom = TINY.replace("--save_interval=4", "--save_interval=100")
    _, mean = prepare(tmp_path, options=f"{seldom} {CONSTANT}").trainings
    (only,) = compare.train_commands(mean).values()
    assert f"--save_interval={mean.stops[0]}" in only and "--max_steps=12" in only
    assert "--save_interval=100" not in only
    separate = prepare(tmp_path, schedule="cosine").trainings
    assert len(separate) == 3 and len({training.folder for training in separate}) == 3


def test_shares_of_the_budget_in_options(tmp_path):
    recipes = {"mean": {"objective": "mean_flow", "options": "--optimizer.warmup_steps={25%}"}}
    plan = plan_of(recipes=RECIPES | recipes, max_steps=81)
    (_, mean) = compare.prepare(plan, Options(workdir=str(tmp_path))).recipes
    assert mean.config.optimizer.warmup_steps == 20


# Runs.


def test_interrupted_and_started_again_nothing_is_repeated(tmp_path, fake, monkeypatch):
    comparison = prepare(tmp_path, seeds=(0, 1))
    whole = fake(comparison)
    planned = compare.commands(comparison)
    count = len(planned)
    assert count == 2 * 3 + 2

    class Stopped(Exception):
        pass

    for limit in range(1, count + 1):  # each time one command more, then an end
        before = len(whole.commands)

        def stop_after(command, before=before):
            if len(whole.commands) > before:
                raise Stopped
            whole(command)

        monkeypatch.setattr(compare, "execute", stop_after)
        if limit < count:
            with pytest.raises(Stopped):
                compare.run(comparison)
        else:
            compare.run(comparison)
    assert sorted(whole.commands) == sorted(planned)
    monkeypatch.setattr(compare, "execute", whole)
    compare.run(comparison)
    assert len(whole.commands) == count  # all is there
    (place,) = (tmp_path / "all/mean_seed1/checkpoints/12").iterdir()
    place.write_text("trained anew")
    compare.run(comparison)
    assert [c[0] for c in whole.commands[count:]] == ["eval_fid.py"]  # of that checkpoint alone


def test_a_folder_with_another_run_is_refused(tmp_path, fake):
    comparison = prepare(tmp_path)
    done = fake(comparison)
    compare.run(comparison)
    count = len(done.commands)
    other = prepare(tmp_path, options=f"{TINY} {CONSTANT} --optimizer.beta1=0.5")
    with pytest.raises(UserError, match=r"another run, with optimizer\.beta1=0\.9 \(now 0\.5\)"):
        compare.run(other)
    with pytest.raises(UserError, match="trained to step 12 and holds no checkpoint of step 5"):
        compare.run(prepare(tmp_path, max_steps=5))
    assert len(done.commands) == count
    compare.run(prepare(tmp_path, max_steps=24))  # goes on
    assert all("--max_steps=12" not in command for command in done.commands[count:])


# What is written.


@pytest.fixture
def written(tmp_path, fake):
    rng = np.random.default_rng(1)
    values = {(r, s, n): rng.uniform(1, 9) for r in RECIPES for s in range(3) for n in (1, 4)}

    def value(run, steps):
        name, _, seed = run.partition("_seed")
        return values[name, int(seed), steps]

    group = {
        "title": "a choice",
        "recipes": ("flow", "mean", "rate"),
        "labels": ("(a, 0)", "b", "c"),
        "published": (3.0, 2.0, 1.0),
    }
    comparison = prepare(
        tmp_path, names="flow,mean,rate", seeds=(0, 1, 2), logged="error", groups={"choice": group}
    )
    fake(comparison, value)
    compare.run(comparison)
    options = Options(out=str(tmp_path / "out"))
    return compare_report.write(comparison, options), tmp_path / "out", values, comparison


def test_mean_and_spread_over_seeds(written):
    _, out, values, comparison = written
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2
    flops = {recipe.name: recipe.flops for recipe in comparison.recipes}
    for row in rows:
        seen = [values[row["recipe"], seed, int(row["steps"])] for seed in range(3)]
        assert float(row["value"]) == pytest.approx(np.mean(seen))
        assert float(row["deviation"]) == pytest.approx(np.std(seen, ddof=1))
        assert float(row["train_flops"]) == int(row["train_steps"]) * flops[row["recipe"]]
        assert int(row["train_images"]) == 16 * int(row["train_steps"])
        assert row["nfe"] == row["steps"] and row["seeds"] == "3"


def test_the_table_says_steps_flops_calls_and_real_data(written):
    text, out, values, comparison = written
    assert (out / "results.md").read_text() == text
    assert "## distance, equal training steps: 12" in text
    assert "those of 12 steps of flow" in text
    assert "1 step (NFE 1) | 4 steps (NFE 4) |" in text
    seen = [values["mean", seed, 4] for seed in range(3)]
    assert f"{np.mean(seen):.4g} ± {np.std(seen, ddof=1):.2g} |" in text
    assert "one standard deviation over 3 seeds of training" in text
    assert "held-out split, N = 100: 0.5" in text
    with Image.open(out / "results.png") as picture:
        assert picture.width > 300
    assert json.loads((out / "results.json").read_text())["commands"] == [
        shlex.join(["python", *command]) for command in compare.commands(comparison)
    ]


def test_the_order_of_a_group_beside_the_published_one(written):
    text, out, values, _ = written
    ours = [np.mean([values[name, seed, 1] for seed in range(3)]) for name in RECIPES]
    ranks = np.argsort(np.argsort(ours))
    rho = np.corrcoef(ranks, [2, 1, 0])[0, 1]
    (found,) = json.loads((out / "results.json").read_text())["groups"]
    assert found["spearman"] == pytest.approx(rho)
    assert found["ranks"] == (ranks + 1).tolist()
    assert f"Spearman's ρ of the two orders: {rho:.2f}." in text
    assert "| (a, 0) |" in text


def test_what_training_logged_last(written):
    text, out, _, _ = written
    (flow, *_) = json.loads((out / "results.json").read_text())["logged"]
    assert flow["values"] == [11.5, 12.5, 13.5]  # steps 11 and 12 of 12, and the seed
    assert "| flow | error | 12.5 ± 1 |" in text


def test_tiles_have_a_column_per_class(tmp_path):
    pictures = np.stack(
        [np.full((28, 28, 1), 20 * k + j, np.uint8) for k in range(9) for j in range(10)]
    )
    figures.save_grid(tmp_path / "grid.png", pictures, 10)
    content = compare_report._tile(4, tmp_path / "grid.png").content
    side = 58  # twice 28 and a gap
    assert content.shape == (3 * side, 9 * side, 1)
    middle = content[side // 2 :: side, side // 2 :: side, 0]
    np.testing.assert_array_equal(middle, 20 * np.arange(9)[None] + np.arange(3)[:, None])


# Plans and mistakes.


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"names": "flow,maen"}, "there is no recipe 'maen' in this plan: flow, mean, rate"),
        ({"names": "flow"}, "nothing to compare: give --names with two recipes or more"),
        ({"names": "flow,flow"}, "nothing to compare"),
        (
            {"recipes": RECIPES | {"mean": {"objective": "meanflow", "options": ""}}},
            "recipe mean: no script trains objective 'meanflow', only flow_matching, mean_flow",
        ),
        ({"flops_of": "rate"}, "flops_of=rate: give one of --names, flow, mean"),
        ({"seeds": ()}, "give --seeds=1,2"),
        ({"seeds": (1, 1)}, "different numbers from 0 on"),
        ({"steps": (0,)}, "different numbers from 1 on"),
        ({"max_steps": 0}, "give --max_steps=1000"),
        ({"budgets": "time"}, "give --budgets=steps,flops, or one"),
        ({"options": "--batch_sze=16"}, "did you mean --batch_size"),
        ({"options": "--batch_size=many"}, "invalid literal for int"),
        ({"options": "--batch_size 16"}, "flags as --KEY=VALUE, not '--batch_size'"),
        ({"options": "--seed=3"}, "--seed is the plan's own, leave it out"),
        ({"options": "--optimizer.lr=-1"}, "give --optimizer.lr from"),
        ({"base": "configs/tyo.py"}, "no config file"),
    ],
)
def test_bad_plans_are_told_in_one_line(given, told, tmp_path):
    with pytest.raises(UserError, match=told.replace("(", r"\(")) as error:
        prepare(tmp_path, **given)
    assert "\n" not in cli.printable(str(error.value))
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("variant", ["digits", "mnist", "optimizers", "ablation"])
def test_plans_of_the_project_are_whole(variant):
    plan = cli.load_config(f"{ROOT}/configs/compare.py:{variant}")
    compare.check(plan)
    for name in compare.listed(plan.names):
        words = compare._words(plan, plan.options) + compare._words(
            plan, plan.recipes[name].options
        )
        compare.config_of(f"{ROOT}/{plan.base}", words)
    for group in plan.groups.values():
        assert set(group.recipes) <= set(compare.listed(plan.names))
        assert len(group.recipes) == len(group.labels) == len(group.published)


@pytest.mark.parametrize(("status", "error"), [(3, UserError), (75, Preempted), (-15, Again)])
def test_how_a_command_ends_is_handed_on(status, error, tmp_path, monkeypatch):
    end = "import os, sys; os.kill(os.getpid(), 15) if {0} < 0 else sys.exit({0})"
    (tmp_path / "script.py").write_text(end.format(status))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(error):
        compare.execute(["script.py", f"--workdir={tmp_path}"])


def inside(command):
    """Runs a command as this process: its imports and devices are here."""
    flags = [word.removeprefix("--").partition("=")[::2] for word in command[1:]]
    given = dict(flags)
    if command[0] == "eval_fid.py":
        plan = Plan(
            workdir=[value for name, value in flags if name == "workdir"],
            checkpoint=(given["checkpoint"],),
            steps=tuple(map(int, given["steps"].split(","))),
            num_samples=int(given["num_samples"]),
            bootstrap=0,
            out=given["out"],
        )
        report.write(sweep.run(plan), plan)
    else:
        config = compare.config_of(given["config"], Fake.keys(command))
        flow = command[0] == "train_flow.py"
        train(config, given["workdir"], flow_objective if flow else average_objective)


def test_a_comparison_without_stand_ins(tmp_path, monkeypatch, standard_promotion):
    """Two recipes on points, trained and measured as their commands say."""
    monkeypatch.setattr(compare, "execute", inside)
    evaluation = "--num_samples=64 --bootstrap=0"
    comparison = prepare(tmp_path, max_steps=3, steps=(1,), budgets="steps", evaluation=evaluation)
    compare.run(comparison)
    text = compare_report.write(comparison, Options())
    for recipe in comparison.recipes:
        assert f"| {recipe.name} |" in text and "| 3 |" in text
    rows = json.loads((tmp_path / "all/results.json").read_text())["rows"]
    assert len(rows) == 2 and all(row["value"] > 0 for row in rows)
    for training in comparison.trainings:
        card = json.loads(pathlib.Path(training.folder, "card.json").read_text())
        assert card["flops_per_step"] == training.recipe.flops  # as it was read before training


def test_a_dry_run_prints_the_commands_and_leaves_nothing(tmp_path):
    words = ["--config=configs/compare.py:digits", "--names=flow_matching,mean_flow", "--dry_run"]
    words += [f"--options={TINY}", "--base=configs/toy.py:spirals", f"--workdir={tmp_path}/all"]
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    scripts = [shlex.split(line)[1] for line in done.stdout.splitlines()]
    assert set(scripts[:-1]) >= {"train_flow.py", "train_meanflow.py"}
    assert scripts[-1] == "eval_fid.py"
    assert not (tmp_path / "all").exists()
