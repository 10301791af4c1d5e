"""The original's tensors of DINOv2 under the names of other files, for the tests."""

import numpy as np

Tensors = dict[str, np.ndarray]

_HUGGING_FACE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "w12": "weights_in",
    "w3": "weights_out",
}


def hugging_face(tensors: Tensors) -> Tensors:
    """As transformers' Dinov2Model has them: query, key and value apart."""
    found = {}
    for name, value in tensors.items():
        for old, new in _HUGGING_FACE.items():
            name = name.replace(old, new)
        name = name.replace("blocks.", "encoder.layer.")
        name = f"layernorm{name[4:]}" if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for word, part in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{word}")] = part
        else:
            found[name] = value
    return found


def timm(tensors: Tensors) -> Tensors:
    """As timm has them: no mask token, and SwiGLU's two layers named as an MLP's."""
    return {
        name.replace("w12", "fc1").replace("w3", "fc2"): value
        for name, value in tensors.items()
        if name != "mask_token"
    }
