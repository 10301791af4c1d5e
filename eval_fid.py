"""Compares runs by the distance of their samples from real data, step count by step count:

    python eval_fid.py --workdir=runs/digits/flow_matching --workdir=runs/digits/mean_flow \\
        --steps=1,2,4,8,16,32 --num_samples=2000 --out=runs/digits/eval

A run is a training script's --workdir, or a folder that an exported model lies in. The folder --out
gets results.md, results.csv, results.png (distance by step count), samples.png and a grid of
samples per run and step count.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from pipelines import report, sweep
from utils import cli

WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run's folder; give the flag once per run.")
STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8", "16", "32"], "Sampling steps, by commas.")
GUIDANCE = flags.DEFINE_list(
    "guidance",
    ["1"],
    "Scales ω of classifier-free guidance in sampling, by commas; 1 for none. A run trained with "
    "guidance needs none, and every other scale doubles the network calls.",
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 2000, "Samples per cell; fewer give higher distances, so compare at one number."
)
OUT = flags.DEFINE_string("out", "runs/eval", "Folder of the table and the pictures.")
SEED = flags.DEFINE_integer("seed", 0, "Of noise and labels, which are the same for every run.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Samples at a time; changes no result.")
CACHE_DIR = flags.DEFINE_string("cache_dir", "runs/cache", "Keeps classifiers and references.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "The pictures (not latents), if they have moved.")
AUTOENCODER = flags.DEFINE_string(
    "autoencoder", "", "Of runs on latents: its folder, if not where the run found it."
)


def main(_: Sequence[str]) -> None:
    """Measures every run and prints the table."""
    plan = sweep.Plan(
        steps=_numbers("steps", STEPS.value, int),
        guidance=_numbers("guidance", GUIDANCE.value, float),
        num_samples=NUM_SAMPLES.value,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
    )
    runs = sweep.load_runs(WORKDIR.value, AUTOENCODER.value)
    pathlib.Path(OUT.value).mkdir(parents=True, exist_ok=True)  # not after the work
    sections = sweep.measure(runs, plan, CACHE_DIR.value, DATA_DIR.value)
    print(report.write(sections, OUT.value))
    print(f"written to {OUT.value}: results.md, results.csv, results.png, samples*.png")


def _numbers(flag: str, words: list[str], kind: type) -> tuple:
    try:
        return tuple(kind(word) for word in words)
    except ValueError as error:
        raise cli.UserError(f"--{flag}={','.join(words)}: numbers, separated by commas") from error


if __name__ == "__main__":
    cli.run(main)
