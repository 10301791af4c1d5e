"""Recipes at equal budgets: a plan → training runs → evaluations, as commands, each done once.

A plan is a config of configs/compare.py. Nothing is computed here but FLOPs: training and
evaluation are the commands that a user would give, printed before they run, and they go on where
they were interrupted. Where the schedule is constant a run is trained to the lesser of its budgets,
then on to the greater: the same command with a greater --max_steps. Jobs may share a folder.
"""

import contextlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from configs import compare as plans
from pipelines import build
from pipelines.jobs import Job, work_off
from pipelines.objectives import AVERAGES, average_objective, flow_objective
from pipelines.train import check_workdir, load, step_flops
from utils import cli, data, files
from utils.claims import Claims
from utils.cli import UserError, flatten
from utils.hosts import LOST, PREEMPTED, Again, Preempted

ROOT = pathlib.Path(__file__).parents[1]
BUDGETS = ("steps", "flops")
TRAINERS = {  # by script, the objectives that it trains; the first is its default
    "train_flow.py": ("flow_matching",),
    "train_meanflow.py": tuple(AVERAGES),
}
DATA = ("dataset_name", "data_dir", "image_size", "holdout", "use_stable_vae", "autoencoder")
ROWS = "results.json"  # of an evaluation


class Options(NamedTuple):
    """What else is asked of a comparison; the flags of scripts/compare.py beside the plan's keys.

    Attributes:
      workdir: Folder of the runs and evaluations; default runs/compare/NAME of the plan.
      out: Folder of results.md, .csv, .json, .png and samples.png; default: the workdir.
      dry_run: Prints the commands, and runs nothing.
      expires: Seconds after which the runs of a job that died elsewhere are taken over.
    """

    workdir: str = ""
    out: str = ""
    dry_run: bool = False
    expires: int = 300


class Recipe(NamedTuple):
    """One way of training.

    Attributes:
      words: the flags of its script, but for seed, steps and folder.
      flops: of a step.
      targets: training steps by budget.
    """

    name: str
    objective: str
    script: str
    words: tuple[str, ...]
    config: ConfigDict
    data: str  # the data set's identity
    flops: int
    targets: dict[str, int]


class Training(NamedTuple):
    """A run's folder, and the steps at which it is measured, in order."""

    recipe: Recipe
    seed: int
    folder: str
    stops: tuple[int, ...]


class Evaluation(NamedTuple):
    """What is measured in one command: the checkpoints of several runs at one step."""

    out: str
    step: int
    runs: tuple[Training, ...]


class Comparison(NamedTuple):
    """A plan, and all that it asks for."""

    plan: ConfigDict
    recipes: tuple[Recipe, ...]
    trainings: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]
    workdir: str


Command = list[str]


def prepare(plan: ConfigDict, options: Options) -> Comparison:
    """Looks at a plan, counts the FLOPs, and says what is to be trained and measured.

    Raises:
      UserError: no plan, an unknown recipe, an objective of no script, nothing to compare, or what
        the recipes' own configs raise.
    """
    check(plan)
    workdir = options.workdir or f"runs/compare/{plan.name}"
    files.check_local(workdir=workdir, out=options.out)
    recipes = _budgeted([_recipe(plan, name) for name in listed(plan.names)], plan)
    trainings = [t for seed in plan.seeds for r in recipes for t in _trainings(r, seed, workdir)]
    steps = sorted({step for training in trainings for step in training.stops})
    evaluations = tuple(
        Evaluation(
            f"{workdir}/evaluations/{plan.name}_{step}",
            step,
            tuple(training for training in trainings if step in training.stops),
        )
        for step in steps
    )
    return Comparison(plan, tuple(recipes), tuple(trainings), evaluations, workdir)


def check(plan: ConfigDict) -> None:
    """Raises UserError where a plan cannot be what is meant."""
    if set(plan.keys()) != set(plans.plan("", {}).keys()):
        raise UserError(
            "this config is no plan of a comparison: give --config=configs/compare.py:digits, or "
            "mnist"
        )
    known, names = ", ".join(plan.recipes), listed(plan.names)
    for name in names:
        if name not in plan.recipes:
            raise UserError(f"there is no recipe {name!r} in this plan: {known}")
        _script(name, plan.recipes[name].objective)
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"nothing to compare: give --names with two recipes or more of {known}")
    if plan.flops_of not in ("", *names):
        raise UserError(f"flops_of={plan.flops_of}: give one of --names, {', '.join(names)}")
    for key, least in (("seeds", 0), ("steps", 1)):
        numbers = plan[key]
        whole = numbers and all(type(n) is int and n >= least for n in numbers)
        if not whole or len(set(numbers)) < len(numbers):
            raise UserError(f"{key}={numbers}: give --{key}=1,2, different numbers from {least} on")
    if plan.max_steps < 1:
        raise UserError(f"max_steps={plan.max_steps}: give --max_steps=1000, at least 1")
    if not listed(plan.budgets) or not set(listed(plan.budgets)) <= set(BUDGETS):
        raise UserError(f"budgets={plan.budgets!r}: give --budgets={','.join(BUDGETS)}, or one")


def listed(words: str) -> tuple[str, ...]:
    """What a key lists by commas."""
    return tuple(word.strip() for word in words.split(",") if word.strip())


def _script(name: str, objective: str) -> str:
    for script, objectives in TRAINERS.items():
        if objective in objectives:
            return script
    known = ", ".join(sum(TRAINERS.values(), ()))
    raise UserError(f"recipe {name}: no script trains objective {objective!r}, only {known}")


# Budgets.


def _recipe(plan: ConfigDict, name: str) -> Recipe:
    """A recipe with its FLOPs; targets follow."""
    given = plan.recipes[name]
    place = (f"--data_dir={plan.data_dir}",) if plan.data_dir else ()
    words = place + _words(plan, plan.options) + _words(plan, given.options)
    script = _script(name, given.objective)
    if given.objective != TRAINERS[script][0]:  # the script's own needs no word
        words = (*words, f"--objective={given.objective}")
    config = config_of(plan.base, (*words, f"--max_steps={plan.max_steps}"))
    build.check_ranges(config)
    config.objective = given.objective
    identity, flops = _flops(config, script)
    words = (f"--config={plan.base}", *words)
    return Recipe(name, given.objective, script, words, config, identity, flops, {})


def _words(plan: ConfigDict, options: str) -> tuple[str, ...]:
    """Flags, with shares of max_steps for {60%} and the like."""
    text = re.sub(r"\{(\d+)%\}", lambda m: str(plan.max_steps * int(m[1]) // 100), options)
    words = tuple(shlex.split(text))
    for word in words:
        if not re.match(r"--[\w.]+=", word):
            raise UserError(f"options={options!r}: flags as --KEY=VALUE, not {word!r}")
        key = re.split("[.=]", word[2:])[0]
        if key in ("config", "workdir", "seed", "max_steps", "objective"):
            raise UserError(f"options={options!r}: --{key} is the plan's own, leave it out")
    return words


def config_of(base: str, words: Sequence[str]) -> ConfigDict:
    """The config that a training script makes of `--config=base` and these flags.

    Raises:
      UserError: an unknown key or a value of the wrong type.
    """
    values, before = flags.FlagValues(), sys.argv
    argv = cli.expand(["", f"--config={base}", *words], {"config"})
    cli.check_keys(argv)
    try:
        sys.argv = argv  # config_flags reads overrides from there
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(f"{' '.join(words)}: {error}") from error
    finally:
        sys.argv = before
    config = values["config"].value
    cli.unset_sizes(config, argv)
    return config


def _flops(config: ConfigDict, script: str) -> tuple[str, int]:
    """The identity of the data, and the FLOPs of a training step."""
    dataset = _dataset(config)
    make = flow_objective if script == "train_flow.py" else average_objective
    objective = make(config, dataset.num_classes, local=config.batch_size // config.accumulation)
    codec = build.autoencoder(config, dataset.shape, dataset.autoencoder)
    shape = build.latent_shape(codec, dataset.shape)
    return dataset.identity, step_flops(config, shape, dataset.num_classes, objective)


_loaded: dict[tuple, data.Dataset] = {}  # the last one, which recipes share


def _dataset(config: ConfigDict) -> data.Dataset:
    key = (*(config[name] for name in DATA), config.model.class_dropout_prob == 1)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load(config)
    return _loaded[key]


def _budgeted(recipes: list[Recipe], plan: ConfigDict) -> list[Recipe]:
    """The recipes with their steps: max_steps, and as many as make the FLOPs of `flops_of`."""
    if len({recipe.data for recipe in recipes}) > 1:
        raise UserError("recipes on different data do not compare: one data set per plan")
    first = {recipe.name: recipe for recipe in recipes}[plan.flops_of or recipes[0].name]
    return [
        recipe._replace(
            targets={
                budget: plan.max_steps
                if budget == "steps"
                else equal_flops(plan.max_steps, first.flops, recipe.flops)
                for budget in listed(plan.budgets)
            }
        )
        for recipe in recipes
    ]


def equal_flops(steps: int, flops: int, other: int) -> int:
    """How many steps of `other` FLOPs come nearest to `steps` of `flops` each; at least one."""
    return max(1, (2 * steps * flops + other) // (2 * other))


def _trainings(recipe: Recipe, seed: int, workdir: str) -> Iterator[Training]:
    """One run for all budgets, or one for each where the rate depends on the last step."""
    stops = tuple(sorted(set(recipe.targets.values())))
    folder = f"{workdir}/{recipe.name}_seed{seed}"
    if recipe.config.optimizer.schedule == "constant":
        yield Training(recipe, seed, folder, stops)
    else:
        yield from (Training(recipe, seed, f"{folder}_{stop}", (stop,)) for stop in stops)


# Commands.


def train_commands(training: Training) -> dict[int, Command]:
    """What trains a run, by the step at which it ends: each goes on where the one before ended.

    One command is enough where a save falls on the first stop, no later than the config saves.
    """
    recipe, stops = training.recipe, training.stops
    interval = recipe.config.save_interval
    words = [recipe.script, *recipe.words, f"--seed={training.seed}"]
    if len(stops) == 2 and stops[0] <= interval:
        interval, stops = stops[0], stops[1:]
        words = [word for word in words if not word.startswith("--save_interval=")]
        words += [f"--save_interval={interval}"]
    # All saves since the first stop, so that its checkpoint stays.
    keep = 2 + (stops[-1] - training.stops[0]) // interval
    words += [f"--keep_checkpoints={max(keep, recipe.config.keep_checkpoints)}"]
    return {s: [*words, f"--max_steps={s}", f"--workdir={training.folder}"] for s in stops}


def evaluate_command(plan: ConfigDict, evaluation: Evaluation) -> Command:
    """What measures the runs at one training step."""
    steps = ",".join(map(str, plan.steps))
    return [
        "eval_fid.py",
        *(f"--workdir={run.folder}" for run in evaluation.runs),
        *(f"--checkpoint={evaluation.step}", f"--steps={steps}"),
        *shlex.split(plan.evaluation),
        f"--out={evaluation.out}",
    ]


def commands(comparison: Comparison) -> list[Command]:
    """All commands, in their order."""
    found = [c for training in comparison.trainings for c in train_commands(training).values()]
    return found + [evaluate_command(comparison.plan, e) for e in comparison.evaluations]


def told(command: Command) -> str:
    """A command as a shell takes it, in the folder of the checkout."""
    return shlex.join(["python", *command])


def execute(command: Command) -> None:
    """Prints a command, and runs it as a process; SIGTERM is handed on.

    Raises:
      UserError: it failed, and has said why.
      Preempted, Again: it was asked to stop, or lost another host; the same command goes on.
    """
    print(told(command), flush=True)
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    with _handed_on() as started:
        process = started(words)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal sent it to both
            process.wait()
            raise
    if status == PREEMPTED:
        raise Preempted(_step_of(command))
    if status in (LOST, -signal.SIGTERM):
        raise Again(f"{told(command)} was ended: the same command goes on")
    if status:
        raise UserError(f"{told(command)} ended with status {status}, and says why above")


def _step_of(command: Command) -> int:
    """The last step that a run has saved."""
    folder = next(word for word in command if word.startswith("--workdir=")).partition("=")[2]
    return max(saved(folder), default=0)


@contextlib.contextmanager
def _handed_on() -> Iterator[Callable[[Command], subprocess.Popen]]:
    """Starts a process that is told when this one is to end."""
    running: list[subprocess.Popen] = []

    def start(words: Command) -> subprocess.Popen:
        running.append(subprocess.Popen(words))
        return running[0]

    def end(*_: Any) -> None:
        for process in running:
            process.terminate()

    alone = threading.current_thread() is threading.main_thread()
    if alone:
        old = signal.signal(signal.SIGTERM, end)
    try:
        yield start
    finally:
        if alone:
            signal.signal(signal.SIGTERM, old or signal.SIG_DFL)


# Runs.


def run(comparison: Comparison, expires: float = 300.0) -> None:
    """Trains what is not trained, then measures what is not measured.

    Raises:
      UserError: a folder that holds another run, or a command that failed.
    """
    for training in comparison.trainings:
        _check_folder(training)
    claims = Claims(f"{comparison.workdir}/claims", expires, expires / 10)
    work_off(claims, [_job(training) for training in comparison.trainings])
    measure = [_measuring(comparison.plan, each) for each in comparison.evaluations]
    work_off(claims, [job for job in measure if not job.done()])


def _job(training: Training) -> Job:
    def done() -> bool:
        return set(training.stops) <= set(saved(training.folder))

    def work(held: Callable[[], bool]) -> None:
        for stop, command in train_commands(training).items():
            if stop not in saved(training.folder):
                execute(command)

    return Job(pathlib.Path(training.folder).name, done, work)


def saved(folder: str) -> list[int]:
    """The steps of which a run holds a checkpoint; those being written have longer names."""
    names = files.names(files.place(folder) / "checkpoints")
    return sorted(int(name) for name in names if name.isdigit())


def _check_folder(training: Training) -> None:
    """Raises UserError where the folder holds another run, or has passed a stop."""
    config, path = training.recipe.config.copy_and_resolve_references(), training.folder
    config.update({"seed": training.seed, "max_steps": training.stops[-1]})
    check_workdir(files.place(path), config, training.recipe.data)
    there = saved(path)
    missed = [stop for stop in training.stops if stop not in there and stop < max(there, default=0)]
    if missed:
        raise UserError(
            f"{path} has been trained to step {there[-1]} and holds no checkpoint of step "
            f"{missed[0]}, which this budget needs: name another --workdir"
        )


def _measuring(plan: ConfigDict, evaluation: Evaluation) -> Job:
    """The job of an evaluation; it is done where its rows name the runs as they are now."""
    command = evaluate_command(plan, evaluation)
    mark = epath.Path(evaluation.out) / "command.json"
    stamp = {"command": command, "runs": [_stamp(t, evaluation.step) for t in evaluation.runs]}

    def done() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(mark.read_text()) == stamp
        return False

    def work(held: Callable[[], bool]) -> None:
        execute(command)
        files.write(mark, json.dumps(stamp))

    return Job(pathlib.Path(evaluation.out).name, done, work)


def _stamp(training: Training, step: int) -> str:
    """What no other weights have: when they were written, as `pipelines.runs` has it."""
    place = files.place(training.folder) / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return place.read_text() if place.exists() else ""


def use_cpu() -> None:
    """Leaves accelerators to the commands: this process counts FLOPs, from shapes alone."""
    jax.config.update("jax_platforms", "cpu")


def described(plan: ConfigDict) -> dict[str, Any]:
    """The plan's keys as JSON has them."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in flatten(plan).items()}
