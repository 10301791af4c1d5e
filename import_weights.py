"""Makes other people's networks ours: a folder that sample.py, eval_fid.py and training open.

    # PyTorch: facebookresearch/DiT, willisma/SiT, zhuyu-cs/MeanFlow
    python import_weights.py --format=dit --checkpoint=DiT-XL-2-256x256.pt --out=imported/dit
    python import_weights.py --format=sit --checkpoint=SiT-XL-2-256.pt --out=imported/sit
    python import_weights.py --format=meanflow_torch --checkpoint=0400000.pt --out=imported/zy
    # JAX: Gsunshine/meanflow (a msgpack file or an orbax folder), kvfrans/jax-flow (a pickle)
    python import_weights.py --format=meanflow --checkpoint=checkpoint_1200960 --out=imported/mf
    python import_weights.py --format=jax_flow --checkpoint=checkpoint.pkl --out=imported/jf

Then `FlowPipeline.from_pretrained("imported/sit").velocity(z, r, t, labels)` is the velocity in our
convention (t = 0 data, t = 1 noise), and MeanFlow can start from it:
`python train_meanflow.py --init_from=imported/sit …`. PyTorch's files need `pip install
torch`; .safetensors files do not. Files are read without running what they say. DiT's and SiT's
tensors have the same names and shapes: only --format tells them apart.
"""

from collections.abc import Sequence

from pipelines.imports import folder
from utils import cli

cli.define_flags(folder.Import)


def main(_: Sequence[str]) -> None:
    """Checkpoint → folder."""
    print(folder.run(cli.read_flags(folder.Import)))


if __name__ == "__main__":
    cli.run(main)
