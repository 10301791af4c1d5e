"""Draws pictures from a trained model: a labelled grid, single PNGs, an animation.

    # a grid of classes by chance, from the model that comes with the code
    python sample.py --workdir=pretrained/digits_mean_flow
    # sevens in 1, 4 and 32 steps, side by side from the same noise
    python sample.py --workdir=pretrained/digits_mean_flow --labels=7 --steps=1,4,32
    # classes by name, with guidance in the middle of the way
    python sample.py --workdir=runs/imagenet256/flow_matching --labels="golden retriever,otter" \\
        --steps=50 --sampler=heun --guidance=4 --guidance_interval=0.1:0.8
    # as many steps as an error of 1e-4 needs; two steps at times of one's own
    python sample.py --workdir=pretrained/digits_flow_matching --sampler=dopri5 --tolerance=1e-4
    python sample.py --workdir=pretrained/digits_mean_flow --grid=1,0.6,0
    # the way from noise to pictures, and a way through noises, as animations
    python sample.py --workdir=pretrained/digits_flow_matching --video=denoising
    python sample.py --workdir=pretrained/digits_mean_flow --labels=3,8 --video=interpolation
    # again at each key, while a run trains
    python sample.py --workdir=runs/digits/mean_flow --watch

A picture is a function of the model, its label, --seed and its index (from --first on), whatever
is drawn beside it. Each PNG holds its settings and, as "command", what makes it again: exiftool
FILE shows them.
"""

from collections.abc import Sequence

from pipelines import sampling, sampling_files, sampling_video, sampling_watch
from utils import cli

cli.define_flags(sampling.Sampling)


def main(_: Sequence[str]) -> None:
    """Draws what is asked for, and says where it lies."""
    job = sampling.prepare(cli.read_flags(sampling.Sampling))
    print(sampling.described(job))
    if job.options.watch:
        sampling_watch.watch(job)
    elif job.options.video:
        path, frames = sampling_video.write(job)
        print(f"{path}: {frames} frames")
    else:
        drawn = []
        for each in sampling.draw_all(job):
            print(sampling.told(each, job.batch))
            drawn.append(each)
        print("\n".join(sampling_files.write(job, drawn)))


if __name__ == "__main__":
    cli.run(main)
