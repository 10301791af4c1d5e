"""Checkpoints of a run: saved in the background, several kept, restored onto any mesh.

A checkpoint is a dict of named parts (arrays in trees); a part can be read alone, as sampling reads
the averaged parameters and leaves the optimizer's state. Metadata records the data position.
"""

import os
import pathlib
from typing import Any

from orbax.checkpoint import v1 as ocp

from utils.cli import UserError


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`; use it as a context, which waits for saves."""

    def __init__(self, workdir: str | os.PathLike, keep: int | None = None):
        """Opens the folder, making it if needed; nothing is deleted unless `keep` says so."""
        self.path = pathlib.Path(workdir).absolute() / "checkpoints"
        decide = ocp.training.save_decision_policies.FixedIntervalPolicy(1)  # callers know when
        kept = ocp.training.preservation_policies
        preserve = kept.LatestN(keep) if keep else kept.PreserveAll()
        self._orbax = ocp.training.Checkpointer(
            self.path,
            save_decision_policy=decide,
            preservation_policy=preserve,
            cleanup_tmp_directories=keep is not None,  # of saves that were killed
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._orbax.latest.step if self._orbax.latest else None

    @property
    def steps(self) -> tuple[int, ...]:
        """All steps saved, oldest first."""
        return tuple(sorted(saved.step for saved in self._orbax.checkpoints))

    def save(self, step: int, parts: dict[str, Any], **metadata: Any) -> None:
        """Saves in the background; the arrays may be used up as soon as this returns."""
        if step != self.latest:
            self._orbax.save_checkpointables_async(step, parts, custom_metadata=metadata)

    def restore(self, parts: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Returns the named parts of `step` (default: the newest).

        Args:
          parts: {name: tree of `jax.ShapeDtypeStruct`}, whose shardings say where arrays go. A part
            may be given by some of its entries: the others are not read.
        Raises:
          UserError: there is no such checkpoint, or it is damaged or of another network.
        """
        step = self.latest if step is None else step
        try:
            with _some_entries():
                return self._orbax.load_checkpointables(step, parts)
        except Exception as error:  # orbax raises many kinds for a damaged folder
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            raise UserError(
                f"checkpoint {self.path / str(step)} cannot be read ({reason}): "
                "if it is damaged, move that folder away to go back to the checkpoint before it"
            ) from error


def _some_entries() -> ocp.Context:
    """Lets a part be read by some of its entries."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context
