"""The public formats of DiT-like networks: their tensors' names, and what their authors mean by t.

Facts of the repositories' own code, read in November 2026: facebookresearch/DiT `models.py` and
`sample.py`, willisma/SiT `models.py` and `transport/path.py`, Gsunshine/meanflow `meanflow.py` and
`models/`, zhuyu-cs/MeanFlow `sit.py` and `evaluate.py`, kvfrans/jax-flow `diffusion_transformer.py`
and `train_flow.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

MSE, EMA = "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"
QKV = "blocks.attention.qkv"
PARTS = ("query", "key", "value")  # of jax-flow's, in the order that ours has them as one


class Format(NamedTuple):
    """What a repository saves, and what its network computes.

    Attributes:
      modules: our module → theirs; "#" stands for the number of a block.
      torch: weights are (out, in), convolutions (out, in, height, width); else flax's (in, out) and
        (height, width, in, out).
      objective: ours that it was trained with: flow_matching or mean_flow.
      prediction: velocity, or noise of DiT's variance-preserving schedule.
      reverses: t = 1 is data, so that u(z, t, t) = −net(z, 1 − t).
      time_scale: times are multiplied by it before the sinusoids.
      positions: name of the table of positions, "" where the file has none; ours is fixed.
      projectors: prefixes of what was there for training alone.
      origin, licence: the repository, and the licence that its LICENSE file states.
      autoencoder: name on the hub of the one that it samples with.
      options: what the options that PyTorch's checkpoints hold must begin with, where they do hold
        them: other values make another network, or the same one mean something else.
      remark: what is told of the latents.
    """

    modules: Mapping[str, str]
    torch: bool
    objective: str
    origin: str
    licence: str
    autoencoder: str = MSE
    prediction: str = "velocity"
    reverses: bool = False
    time_scale: float = 1.0
    positions: str = "pos_embed"
    projectors: tuple[str, ...] = ()
    options: Mapping[str, str] = MappingProxyType({})
    remark: str = ""

    @property
    def time_inputs(self) -> str:
        """Which times the network is told, as `config.model.time_inputs` names them."""
        return "t,t-r" if "condition.time_t-r.in" in self.modules else "t"


TORCH = {
    "patch": "x_embedder.proj",
    "condition.time_t.in": "t_embedder.mlp.0",
    "condition.time_t.out": "t_embedder.mlp.2",
    "condition.label": "y_embedder.embedding_table",
    QKV: "blocks.#.attn.qkv",
    "blocks.attention.out": "blocks.#.attn.proj",
    "blocks.mlp.in": "blocks.#.mlp.fc1",
    "blocks.mlp.out": "blocks.#.mlp.fc2",
    "blocks.modulation": "blocks.#.adaLN_modulation.1",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.out": "final_layer.linear",
}
MEANFLOW = {
    "patch": "x_embedder.proj",
    "condition.time_t.in": "t_embedder.mlp.layers_0._flax_linear",
    "condition.time_t.out": "t_embedder.mlp.layers_2._flax_linear",
    "condition.time_t-r.in": "h_embedder.mlp.layers_0._flax_linear",
    "condition.time_t-r.out": "h_embedder.mlp.layers_2._flax_linear",
    "condition.label": "y_embedder.embedding_table._flax_embedding",
    QKV: "blocks.layers_#.attn.qkv._flax_linear",
    "blocks.attention.out": "blocks.layers_#.attn.proj._flax_linear",
    "blocks.mlp.in": "blocks.layers_#.mlp.fc1._flax_linear",
    "blocks.mlp.out": "blocks.layers_#.mlp.fc2._flax_linear",
    "blocks.modulation": "blocks.layers_#.adaLN_modulation.layers_1._flax_linear",
    "head.modulation": "final_layer.adaLN_modulation.layers_1._flax_linear",
    "head.out": "final_layer.linear._flax_linear",
}
JAX_FLOW = {
    "patch": "PatchEmbed_0.Conv_0",
    "condition.time_t.in": "TimestepEmbedder_0.Dense_0",
    "condition.time_t.out": "TimestepEmbedder_0.Dense_1",
    "condition.label": "LabelEmbedder_0.Embed_0",
    **{f"{QKV}.{part}": f"DiTBlock_#.MultiHeadDotProductAttention_0.{part}" for part in PARTS},
    "blocks.attention.out": "DiTBlock_#.MultiHeadDotProductAttention_0.out",
    "blocks.mlp.in": "DiTBlock_#.MlpBlock_0.Dense_0",
    "blocks.mlp.out": "DiTBlock_#.MlpBlock_0.Dense_1",
    "blocks.modulation": "DiTBlock_#.Dense_0",
    "head.modulation": "FinalLayer_0.Dense_0",
    "head.out": "FinalLayer_0.Dense_1",
}
TWO_TIMES = {
    "condition.time_t-r.in": "r_embedder.mlp.0",
    "condition.time_t-r.out": "r_embedder.mlp.2",
}

FORMATS = {
    "dit": Format(
        TORCH,
        torch=True,
        objective="flow_matching",
        prediction="noise",
        options={"model": "DiT-"},
        origin="github.com/facebookresearch/DiT",
        licence="CC-BY-NC-4.0",
    ),
    "sit": Format(
        TORCH,
        torch=True,
        objective="flow_matching",
        reverses=True,
        options={"model": "SiT-", "path_type": "Linear", "prediction": "velocity"},
        origin="github.com/willisma/SiT",
        licence="MIT",
    ),
    "meanflow": Format(
        MEANFLOW,
        torch=False,
        objective="mean_flow",
        positions="",
        origin="github.com/Gsunshine/meanflow",
        licence="MIT",
    ),
    "meanflow_torch": Format(
        TORCH | TWO_TIMES,
        torch=True,
        objective="mean_flow",
        projectors=("projectors.", "projector."),
        options={"model": "SiT-", "path_type": "linear"},
        remark="its latents are 0.18125 of the autoencoder's, and ours are decoded as 0.18215 of "
        "them: half a percent less contrast",
        origin="github.com/zhuyu-cs/MeanFlow",
        licence="MIT",
        autoencoder=EMA,
    ),
    "jax_flow": Format(
        JAX_FLOW,
        torch=False,
        objective="flow_matching",
        reverses=True,
        time_scale=10_000.0,
        origin="github.com/kvfrans/jax-flow",
        licence="",
    ),
}
