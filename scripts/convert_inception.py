"""Converts weights from a .pth to .safetensors, once; torch is told to read tensors only.

  python scripts/convert_inception.py --file=pt_inception-2015-12-05-6726825d.pth

It needs torch (`pip install torch`; the extra `convert`), which nothing else here does. Into
runs/cache/inception_fid.safetensors (--out), the file is found without --weights.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from pipelines import extractors
from utils import cli

FILE = flags.DEFINE_string("file", "", "The .pth: Inception's, or DINOv2's original ones.")
OUT = flags.DEFINE_string("out", "", "What is written; default: FILE with .safetensors.")


def main(_) -> None:
    """Converts, and says whether it is the file that published FIDs are measured with."""
    if not FILE.value:
        raise cli.UserError(f"which file? --file=FILE.pth, Inception's from {extractors.URL}")
    source = pathlib.Path(FILE.value).expanduser()
    out = pathlib.Path(OUT.value or source.with_suffix(".safetensors")).expanduser()
    if out.suffix != ".safetensors":
        raise cli.UserError(f"--out={out} should end in .safetensors")
    if out.exists():
        raise cli.UserError(f"{out} is there already: name another with --out, or remove it")
    extractors.convert(source, out)
    found = extractors.checksum(source)
    known = "the known" if found == extractors.SHA256 else "not the known"
    print(f"sha256 of {source}: {found}, {known} file of the FID Inception")
    print(f"wrote {out}: give it as --weights={out}")


if __name__ == "__main__":
    cli.run(main)
