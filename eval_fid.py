"""Compares runs by the distance of their samples from real pictures, step count by step count:

    # FID-50K of two runs at six step counts
    python eval_fid.py --workdir=runs/imagenet256/flow_matching \\
        --workdir=runs/imagenet256/mean_flow --steps=1,2,4,8,16,32 --out=runs/eval
    # guidance scales and intervals, all checkpoints, three protocols from one set of samples
    python eval_fid.py --workdir=runs/imagenet256/flow_matching --steps=50 --guidance=1,1.5,2,4 \\
        --guidance_interval=0:1,0.1:0.8 --checkpoint=all --protocol=tf,clean,pytorch
    # without pretrained features: a classifier, trained on the run's own data set
    python eval_fid.py --workdir=runs/digits/mean_flow --features=classifier --num_samples=2000
    # pictures made elsewhere, against ADM's statistics
    python eval_fid.py --samples=pictures.zip --reference=VIRTUAL_imagenet256_labeled.npz

The same command again goes on where it was interrupted; another one with the same --out adds to
its cells, and several jobs may share one --out at a time, as those of a SLURM array do. Several
processes are one job by --coordinator, --num_processes and --process_id, or found by themselves.
"""

from collections.abc import Sequence

from pipelines import report, sweep
from pipelines.plan import Plan
from utils import cli, hosts

cli.define_flags(Plan)
cli.define_flags(hosts.Hosts)


def main(_: Sequence[str]) -> None:
    """Measures what is missing, and prints the table."""
    hosts.join(cli.read_flags(hosts.Hosts))
    plan = cli.read_flags(Plan)
    sections = sweep.run(plan)
    if sections:
        print(report.write(sections, plan))
        print(f"written to {plan.out}: results.md, .csv, .json, .png, samples*.png")


if __name__ == "__main__":
    cli.run(main)
