"""Writes tests/data/imports.npz: what the public networks' own code makes of weights from a seed.

    PEERS=FOLDER .venv/bin/python -m tests.oracles.write_imports

Of each format: "FORMAT/names" and "FORMAT/shapes", the tensors as their code has them ("2,3" for a
shape), and "FORMAT/u", the velocity by their code and the formulas of their conventions.
"""

import pathlib

import numpy as np

from tests import import_case as case
from tests.oracles import public_networks

DATA = pathlib.Path(__file__).parents[1] / "data" / "imports.npz"


def main() -> None:
    """Writes every format."""
    arrays = {}
    for form, build in public_networks.BUILD.items():
        public = build(**public_networks.TINY)
        names = sorted(public.shapes)
        z, r, labels = case.inputs(case.SIDE, case.CLASSES, n=2)
        u = public.velocity(z, r, case.TIMES[:2], labels)
        shapes = [",".join(map(str, public.shapes[name])) for name in names]
        arrays |= {f"{form}/names": np.array(names), f"{form}/shapes": np.array(shapes)}
        arrays[f"{form}/u"] = u.astype(np.float32)
    np.savez_compressed(DATA, **arrays)
    print(f"{DATA.name}: {DATA.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
