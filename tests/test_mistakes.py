"""What a mistake on a command line is told: one line with its mend, exit status 2, nothing written.

`MISTAKES` is the table over all commands. Most are run as forks of one process that has imported
what they need (`tests/forked.py`), a few as a user's shell would.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.forked import ROOT, Commands, Done

MISTAKES = {
    # Names and types, which every command checks alike.
    "unknown key": ("train_flow.py --config.model.dpeth=3", "did you mean --model.depth?"),
    "unknown short key": ("train_flow.py --model.lr 1e-4", "did you mean --optimizer.lr?"),
    "key of other sections": (
        "train_meanflow.py --consistency.omega=2",
        "--consistency.omega: consistency has c, clamp, interval_share",
    ),
    "key of this section": (
        "train_meanflow.py --consistency.clmap=2",
        "did you mean --consistency.clamp?",
    ),
    "misspelt flag": ("train_flow.py --wrkdir=x", "did you mean --workdir?"),
    "misspelt, evaluator": ("eval_fid.py --stesp=1", "did you mean --steps?"),
    "misspelt, preparation": ("prepare_data.py --sorce=x", "did you mean --source?"),
    "misspelt, export": ("scripts/export.py --workdri=x", "did you mean --workdir?"),
    "malformed": ("train_flow.py --=3", "unknown flag or config key"),
    "stray word": ("train_flow.py digits", "stray word 'digits'"),
    "stray word, evaluator": ("eval_fid.py runs/demo", "every option starts with --"),
    "stray word, converter": ("scripts/convert_tfds.py imagenet", "every option starts with --"),
    "no integer": ("train_flow.py --batch_size=many", "invalid literal for int()"),
    "a fraction": ("train_flow.py --batch_size=3.5", "invalid literal for int()"),
    "no value": ("train_flow.py --batch_size", "--config.batch_size=true: invalid literal"),
    "no number": ("train_flow.py --optimizer.lr=fast", "could not convert string to float"),
    "no boolean": ("train_flow.py --tensorboard=maybe", "Non-boolean argument"),
    "no integer, preparation": ("prepare_data.py --image_size=big", "invalid literal for int()"),
    "no list": ("eval_fid.py --workdir=x --steps=a", "--steps=a: numbers, separated by commas"),
    # Config files.
    "no such config": ("train_flow.py --config=configs/dgits.py", "no config file"),
    "a folder as config": ("train_flow.py --config=configs", "there are configs/*.py for"),
    "no plan": (
        "scripts/compare.py --names=shortcut",
        "give --config=configs/compare.py:digits, or",
    ),
    "no such variant": ("train_flow.py --config=configs/toy.py:moon", "one of checkerboard"),
    "no variants": ("train_flow.py --config=configs/digits.py:small", "has no variants: leave"),
    "no config": ("train_flow.py --config=README.md", "no config in README.md"),
    # Data.
    "no such data set": ("train_flow.py --dataset_name dgits", "did you mean digits?"),
    "missing data": ("train_flow.py --config=configs/mnist.py --data_dir=no/where", "no/where"),
    "missing pictures": ("train_flow.py --config=configs/folder.py", "--data_dir"),
    "no pictures": (
        "train_flow.py --dataset_name folder --data_dir=configs",
        "configs holds no pictures",
    ),
    "latents": ("train_flow.py --dataset_name imagenet256 --data_dir=x", "--use_stable_vae=0"),
    "no latents": ("train_flow.py --use_stable_vae=1", "no --data_dir given"),
    "holdout": ("train_flow.py --holdout=1", "give --holdout=0.1"),
    "holdout NaN": ("train_flow.py --holdout=nan", "give --holdout=0.1"),
    "another size": ("train_flow.py --image_size=16", "give --image_size=8"),
    "a size of points": (
        "train_flow.py --config=configs/toy.py --image_size=16",
        "leave --image_size=0",
    ),
    "mirrored points": ("train_flow.py --config=configs/toy.py --flip", "give --flip=False"),
    "cache": ("train_flow.py --cache=ram", "one of disk, host, device"),
    # Training: ranges, and options that do not go together.
    "no batch": ("train_flow.py --batch_size=0", "give --batch_size from 1"),
    "batch of terabytes": ("train_flow.py --batch_size=2000000000", "give --batch_size from 1 to"),
    "batch and devices": ("train_flow.py --batch_size=100 --accumulation=8", "--batch_size=64"),
    "seed": ("train_flow.py --seed=-1", "give --seed from 0"),
    "mesh": ("train_flow.py --mesh.data=3", "mesh.data=3"),
    "mesh of rests": ("train_flow.py --mesh.fsdp=-1", "-1 for one of them"),
    "mesh of none": ("train_flow.py --mesh.fsdp=0", "mesh.fsdp=0"),
    "no interval": ("train_flow.py --log_interval=0", "log_interval=0: give --log_interval from 1"),
    "no training": ("train_flow.py --max_steps=0", "give --max_steps from 1"),
    "not a number": ("train_flow.py --optimizer.lr=nan", "optimizer.lr=nan"),
    "infinite": ("train_flow.py --optimizer.lr=inf", "give --optimizer.lr from"),
    "schedule": ("train_flow.py --optimizer.schedule=linear", "constant, cosine or wsd"),
    "warm-up": ("train_flow.py --config=configs/toy.py --max_steps=9", "warmup_steps=0"),
    "warm-up and decay": (
        "train_flow.py --max_steps=30 --optimizer.warmup_steps=100 --optimizer.schedule=wsd "
        "--optimizer.decay_steps=10",
        "more than max_steps=30: give --optimizer.warmup_steps=3",
    ),
    "scale that is not told": (
        "train_meanflow.py --objective=improved_mean_flow --improved_mean_flow.omega_max=4",
        "give --improved_mean_flow.omega_max=4 --model.guidance_inputs",
    ),
    "average": ("train_flow.py --ema.decay=1", "give --ema.decay from 0 to"),
    "time law": ("train_flow.py --flow_matching.time_law=beta", "logit_normal or uniform"),
    "time mean": ("train_flow.py --flow_matching.time_mean=nan", "flow_matching.time_mean=nan"),
    "share": ("train_meanflow.py --mean_flow.interval_share=2", "from 0 to 1"),
    "kappa": ("train_meanflow.py --mean_flow.kappa=1", "from 0 to 0.999"),
    "interval": ("train_meanflow.py --mean_flow.guidance_interval=a,b", "the lower first"),
    "interval reversed": (
        "train_meanflow.py --mean_flow.guidance_interval=0.8,0.2",
        "two numbers from 0 to 1, the lower first",
    ),
    "time inputs": ("train_meanflow.py --model.time_inputs=t", "two times"),
    "null label": (
        "train_meanflow.py --mean_flow.kappa=0.5 --model.class_dropout_prob=0",
        "trained null label",
    ),
    "guidance without labels": (
        "train_meanflow.py --config=configs/toy.py --mean_flow.omega=2",
        "guidance needs labels",
    ),
    "objective": (
        "train_flow.py --objective=mean_flow",
        "is not of this script: train_flow.py has flow_matching",
    ),
    "a file as workdir": ("train_flow.py --workdir=README.md", "name a folder with --workdir"),
    "wandb": ("train_flow.py --wandb.mode=on", "disabled, offline or online"),
    "patience": ("train_flow.py --save_patience=-1", "give --save_patience from"),
    "best of fewer": ("train_flow.py --keep_best=-1", "give --keep_best from 0"),
    "no skips": ("train_flow.py --skip_limit=0", "give --skip_limit from 1"),
    "stall": ("train_flow.py --stall=nan", "stall=nan: give --stall from"),
    "no boolean for bits": ("train_flow.py --deterministic=perhaps", "Non-boolean argument"),
    # Several processes.
    "half a job": ("train_flow.py --coordinator=localhost:9", "go together: give all three"),
    "half a job, evaluator": ("eval_fid.py --num_processes=2", "go together: give all three"),
    "no port": (
        "prepare_data.py --coordinator=here --num_processes=2 --process_id=0",
        "give HOST:PORT",
    ),
    "a process too many": (
        "train_meanflow.py --coordinator=localhost:9 --num_processes=2 --process_id=2",
        "the 2 processes are 0 to 1",
    ),
    "distributed": ("train_flow.py --distributed=maybe", "one of <auto|on|off>"),
    # Networks.
    "network": ("train_flow.py --model.name=vit", "dit, unet or mlp"),
    "network of other sizes": ("train_flow.py --model.name=unet", "leave it out, or take"),
    "unknown size": ("train_flow.py --model.size=B/3", "one of S/1"),
    "patch": ("train_flow.py --model.patch_size=3", "does not divide 8x8"),
    "heads": ("train_flow.py --model.num_heads=5", "multiple of 4 and of model.num_heads=5"),
    "depth": ("train_flow.py --model.depth=99999999", "give --model.depth from 1 to"),
    "network of terabytes": (
        "train_flow.py --model.hidden_size=900000 --model.num_heads=1",
        "give a smaller --model.hidden_size",
    ),
    "network dtype": ("train_flow.py --model.dtype=float16", "float32 or bfloat16"),
    "mlp for pictures": ("train_flow.py --model.name=mlp", "--model.name=dit for pictures"),
    "no width": (
        "train_flow.py --config=configs/toy.py --model.hidden_size=0",
        "hidden_size from 1",
    ),
    "autoencoder dtype": (
        "train_flow.py --autoencoder_dtype=int8",
        "give --autoencoder_dtype=float32 or bfloat16",
    ),
    # What is drawn and measured during training.
    "no steps": ("train_flow.py --sample.steps=()", "--sample.steps=1,32"),
    "steps of words": ("train_flow.py --sample.steps=1,two", "--sample.steps=1,32"),
    "steps of terabytes": ("train_flow.py --sample.steps=99999999999", "--sample.steps=1,32"),
    "pictures": ("train_flow.py --sample.num=100000", "give --sample.num from 1 to 10000"),
    "scale": ("train_flow.py --sample.guidance=nan", "give --sample.guidance from"),
    "scale without labels": (
        "train_flow.py --config=configs/toy.py --sample.guidance=3",
        "leave --sample.guidance=1",
    ),
    "few": ("train_flow.py --fid.num=3", "give --fid.num=2000"),
    "fewer than none": ("train_flow.py --fid.num=-1", "give --fid.num from 0"),
    "quick features": ("train_flow.py --fid.num=99 --fid.features=vgg", "mobilenet, dinov2 or"),
    "quick steps": ("train_flow.py --fid.num=99 --fid.steps=0", "give --fid.steps=1,32"),
    "quick points": (
        "train_flow.py --config=configs/toy.py --fid.num=99",
        "no pictures' features: leave --fid.num=0",
    ),
    # The evaluator.
    "nothing to measure": ("eval_fid.py", "give --workdir=FOLDER of a run, or --samples=FOLDER"),
    "missing run": ("eval_fid.py --workdir=no/where --out=x", "no/where"),
    "a file as run": ("eval_fid.py --workdir=README.md", "is no run and no exported model"),
    "runs and samples": ("eval_fid.py --workdir=a --samples=b", "measure one, then the other"),
    "samples alone": ("eval_fid.py --samples=pictures", "give --reference=FOLDER"),
    "missing samples": ("eval_fid.py --samples=no --reference=pictures", "no is not there: give"),
    "no samples": ("eval_fid.py --samples=README.md --reference=x", "give a folder or a .zip"),
    "missing reference": (
        "eval_fid.py --samples=pictures --reference=no --weights=w.npz",
        "w.npz does not exist",
    ),
    "no reference": ("eval_fid.py --workdir=x --reference=no/where", "x is no run"),
    "fewer samples": (
        "eval_fid.py --samples=pictures --reference=pictures --num_samples=100",
        "--num_samples=100 needs as many",
    ),
    "no step": ("eval_fid.py --workdir=x --steps=0", "--steps=0: at least 1"),
    "empty steps": ("eval_fid.py --workdir=x --steps=", "leave it out for the default"),
    "many steps": ("eval_fid.py --workdir=x --steps=99999999999", "at most 10000"),
    "guidance": ("eval_fid.py --workdir=x --guidance=nan", "finite numbers, 1 for none"),
    "guidance interval": ("eval_fid.py --workdir=x --guidance_interval=0.8:0.1", "as 0.1:0.8"),
    "sampler": (
        "eval_fid.py --workdir=x --sampler=ddim",
        "there are meanflow, euler, heun, eul",
    ),
    "adaptive": ("eval_fid.py --workdir=x --sampler=dopri5", "draw by sample.py --sampler=dopri5"),
    "grid": ("eval_fid.py --workdir=x --grid=cubic", "there are uniform, cosine, quadratic"),
    "seeds": ("eval_fid.py --workdir=x --seed=-1", "from 0 to 2147483647"),
    "few samples": ("eval_fid.py --workdir=x --num_samples=2", "at least 4, and 2000 say more"),
    "labels": ("eval_fid.py --workdir=x --labels=none", "value should be one of <random|balanced>"),
    "features": ("eval_fid.py --workdir=x --features=vgg", "there are inception, mobilenet"),
    "protocol": ("eval_fid.py --workdir=x --protocol=jax", "there are tf, clean, pytorch"),
    "another's protocol": (
        "eval_fid.py --workdir=x --features=dinov2 --protocol=tf",
        "dinov2 has clean",
    ),
    "metric": ("eval_fid.py --workdir=x --metrics=fidd", "there are fid, sfid, is"),
    "Inception's metric": (
        "eval_fid.py --workdir=x --features=mobilenet --metrics=is",
        "add --features=inception",
    ),
    "files of weights": ("eval_fid.py --workdir=x --weights=a,b", "2 files for 1 features"),
    "classifier of samples": (
        "eval_fid.py --samples=pictures --reference=pictures --features=classifier",
        "no classifier",
    ),
    "one draw": ("eval_fid.py --workdir=x --bootstrap=1", "10 have one; 0 for none"),
    "no batch, evaluator": ("eval_fid.py --workdir=x --batch_size=0", "at least 1"),
    "expires": ("eval_fid.py --workdir=x --expires=0", "--expires=0: at least 10"),
    # Preparation.
    "nothing to prepare": ("prepare_data.py", "give --source=FOLDER_OR_ZIP_OR_TFDS_NAME"),
    "missing source": ("prepare_data.py --source=no --out=o", "no is no folder, no .zip and no"),
    "no zip": ("prepare_data.py --source=README.md --out=o", "give a folder or a .zip"),
    "out a file": (
        "prepare_data.py --source=pictures --out=README.md --autoencoder=none",
        "give a new folder as --out",
    ),
    "out taken": (
        "prepare_data.py --source=pictures --out=mixed --autoencoder=none",
        "give a new folder as --out",
    ),
    "missing autoencoder": (
        "prepare_data.py --source=pictures --out=o --autoencoder=no",
        "no folder no: give a folder with config.json",
    ),
    "mirrored pictures": (
        "prepare_data.py --source=pictures --out=o --autoencoder=none --flip",
        "leave --flip out",
    ),
    "moments dtype": ("prepare_data.py --source=pictures --dtype=int8", "float16 or bfloat16"),
    "labels of": (
        "prepare_data.py --source=pictures --dataset_name=mnist",
        "folder or imagenet256",
    ),
    "no size": ("prepare_data.py --source=pictures --out=o --image_size=0", "--image_size=1 or"),
    "size of terabytes": (
        "prepare_data.py --source=pictures --out=o --autoencoder=none --image_size=9999999",
        "pixels to crop pictures to, 8192 at most",
    ),
    "share of work": ("prepare_data.py --source=pictures --out=o --share=2/2", "give I/N, as 0/2"),
    "no split": ("prepare_data.py --source=pictures --out=o --split=test", "no split test"),
    "report of": ("prepare_data.py --report", "which folder? give --out=FOLDER"),
    "report of nothing": (
        "prepare_data.py --report --out=no",
        "prepare_data.py --out=FOLDER wrote",
    ),
    "statistics of": ("prepare_data.py --statistics=x.npz", "Give --source=PICTURES"),
    "statistics to": (
        "prepare_data.py --statistics=x.txt --source=pictures",
        "name a file that ends in .npz",
    ),
    "statistics of no size": (
        "prepare_data.py --statistics=x.npz --source=pictures --image_size=0",
        "pixels to crop the pictures to",
    ),
    "statistics' features": (
        "prepare_data.py --statistics=x.npz --source=pictures --features=vgg",
        "there are inception",
    ),
    "statistics' weights": (
        "prepare_data.py --statistics=x.npz --source=pictures --features=mobilenet",
        "needs --weights=FILE",
    ),
    "statistics' holdout": (
        "prepare_data.py --statistics=x.npz --source=pictures --holdout=2",
        "a share in [0, 1)",
    ),
    # Sampling, imports, exports.
    "misspelt, sampling": ("sample.py --stesp=1", "did you mean --steps?"),
    "sample what": ("sample.py", "--workdir="),
    "sample nothing": ("sample.py --workdir=no/where", "is no run and no exported model"),
    "misspelt, import": ("import_weights.py --frmat=dit", "did you mean --format?"),
    "import what": ("import_weights.py --format=dit --out=o", "--checkpoint="),
    "import nothing": ("import_weights.py --format=dit --checkpoint=no.pt --out=o", "no.pt"),
    "import of no format": ("import_weights.py --format=flux --checkpoint=c --out=o", "flux"),
    "diffusers what": ("export_diffusers.py --out=o", "--workdir="),
    "diffusers nothing": ("export_diffusers.py --workdir=no --out=o", "is no run and no exported"),
    "curves of what": ("scripts/curves.py", "which runs? --workdir="),
    "curves of nothing": ("scripts/curves.py --workdir=no", "is no run and no exported model"),
    "begun from nothing": ("train_meanflow.py --init_from=no", "no is no run and no exported"),
    "begun from another": (
        "train_meanflow.py --init_from=configs --model.time_scale=0",
        "give --model.time_scale from 0.001",
    ),
    "prediction": (
        "train_flow.py --model.prediction=x",
        "give --model.prediction=velocity, data or noise",
    ),
    "MeanFlow of noise": ("train_meanflow.py --model.prediction=noise", "says nothing of r < t"),
    # Scripts and benchmarks.
    "export what": ("scripts/export.py", "--workdir=runs/... --out=FOLDER"),
    "export no run": ("scripts/export.py --workdir=no --out=o", "is no run and no exported model"),
    "export dtype": ("scripts/export.py --dtype=int8", "one of <float32|float16>"),
    "convert what": ("scripts/convert_inception.py", "which file? --file=FILE.pth"),
    "convert nothing": ("scripts/convert_inception.py --file=no.pth", "no.pth does not exist"),
    "convert to": (
        "scripts/convert_inception.py --file=README.md --out=o.npz",
        "should end in .safetensors",
    ),
    "convert onto": (
        "scripts/convert_inception.py --file=README.md --out=there.safetensors",
        "is there already",
    ),
    "TFDS what": ("scripts/convert_tfds.py", "which data set? --folder="),
    "no TFDS": ("scripts/convert_tfds.py --folder=configs", "configs is no TFDS data"),
    "items": ("benchmarks/data.py --items=0", "0 is not a positive integer"),
    "batches": ("benchmarks/data.py --steps=-1", "-1 is not"),
    "pictures of a call": ("benchmarks/data.py --batch=-1", "-1 is not a non-negative integer"),
    "timed steps": ("benchmarks/evaluation.py --steps=0", "0 is not a positive integer"),
    "timed sizes": ("benchmarks/evaluation.py --sizes=5", "numbers of 10 or more"),
    "timed metric": ("benchmarks/evaluation.py --metrics=fidd", "inception serves fid"),
    "timed draws": ("benchmarks/evaluation.py --bootstrap=1", "give 10, or 0 for none"),
}
AS_TYPED = ("unknown key", "nothing to measure", "missing source")


@pytest.fixture(scope="module")
def commands():
    with Commands() as run:
        yield run


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Where commands are typed: the configs, a text, pictures of one size and of two."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "README.md").write_text("# No picture, no config and no .zip\n")
    (tmp_path / "there.safetensors").write_bytes(b"")
    for name, sizes in {"pictures": (8,) * 5, "mixed": (8, 9, 8, 9, 8)}.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            x = np.full((size, size, 3), 40 * i, np.uint8)
            Image.fromarray(x).save(tmp_path / name / f"{i}.png")
    return tmp_path


def written(folder: pathlib.Path) -> dict[str, bytes]:
    """All folders and files below, links not followed."""
    return {
        os.path.join(place, name): b""
        if name in subfolders
        else pathlib.Path(place, name).read_bytes()
        for place, subfolders, files in os.walk(folder)
        for name in [*subfolders, *files]
    }


def check(done: Done, told: str) -> None:
    """Exit status 2, and one line that starts with "error: " and names the mend."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert told in lines[0]


@pytest.mark.parametrize(("line", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(line, told, commands, folder):
    before = written(folder)
    check(commands(line.split(), folder), told)
    assert written(folder) == before


@pytest.mark.parametrize("name", AS_TYPED)
def test_a_shell_gets_the_same_line_and_status(name, commands, folder):
    line, told = MISTAKES[name]
    script, *options = line.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    check(Done(done.returncode, done.stdout, done.stderr), told)
    assert done.stderr == commands(line.split(), folder).stderr


def test_a_command_that_is_right_is_told_nothing(commands, folder):
    done = commands(["prepare_data.py", "--help"], folder)
    assert done.returncode == 0 and "--source" in done.stdout and not done.stderr
