"""A distance from few samples, for the curves of a run in training."""

import itertools
import pathlib
import tempfile
from typing import Any

from pipelines import groups, sweep
from pipelines.flow import FlowPipeline
from pipelines.plan import CLASSIFIER, Plan, checked
from utils import data


class QuickDistance:
    """The Fréchet distance of some thousand samples; its name says that it is quick, and their N.

    It is a function of the parameters alone: noise and labels are the same at every call.
    """

    def __init__(self, pipeline: FlowPipeline, dataset: data.Dataset):
        """Loads the features, and computes the reference where the cache has none.

        Args:
          dataset: what the run trains on; of latents, their pictures are looked for.

        Raises:
          UserError: an impossible option of `config.fid`, or what loading raises.
        """
        asked = pipeline.config.fid
        self.pipeline = pipeline
        self.plan = checked(
            Plan(
                workdir=("the run in training",),
                steps=tuple(asked.steps),
                num_samples=asked.num,
                features=(asked.features,),
                weights=(asked.weights,) if asked.weights else (),
                reference=asked.reference,
                metrics=("fid",),
                bootstrap=0,
            )
        )
        pictures = None if asked.reference and asked.features != CLASSIFIER else dataset
        if pictures and dataset.origin:
            pictures = data.load_pictures(pipeline.config, dataset.origin)
        self.yardstick = groups.picture_yardstick(
            self.plan, groups.picture_shape(pipeline), pictures
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns {"fid_quick_N/1_step": distance, …} on process 0; all processes call it alike."""
        pipeline, n = self.pipeline.with_params(params), self.plan.num_samples
        labels = sweep.draw_labels(0, n, pipeline.num_classes)
        found = {}
        for steps in self.plan.steps:
            with tempfile.TemporaryDirectory() as folder:
                batches = sweep.sample_batches(pipeline, self.plan, labels, seed=0, steps=steps)
                rows = self.yardstick.measure(batches, n, pathlib.Path(folder), known={}, seed=0)
            for fact in itertools.chain(*rows.values()):
                found[f"{fact['metric']}_quick_{n}/{steps}_step{'s' * (steps > 1)}"] = fact["value"]
        return found
