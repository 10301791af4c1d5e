"""Attention by several implementations, which differ in what can be differentiated and in speed.

`fused` gives the value and its directional derivative in one kernel, in Pallas. With the scores
s = q kᵀ / √d, their tangents ṡ = (q̇ kᵀ + q k̇ᵀ) / √d and p = softmax(s), row by row,

    o = Σ p v        c = Σ p ṡ        ȯ = Σ p (ṡ − c) v + p v̇.

As in online softmax (arXiv 1805.02867, 2205.14135), blocks of keys come one by one, and what is
kept of those seen is, with e = exp(s − m):

    m = max s    w = Σ e    c = Σ e ṡ / w    a = Σ e v    b = Σ e (ṡ − c) v + e v̇

When m grows to m′, the sums shrink by exp(m − m′); when c moves to c′, b gains (c − c′) a. In the
end o = a / w and ȯ = b / w. To keep ṡ − c, not ṡ, costs one product per element and saves digits: a
change of all keys alike, as of the condition on time, gives ṡ a large mean per row, which has no
effect on ȯ, but in bfloat16 would drown what has. No matrix of tokens × tokens is in memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

REVERSE = ("xla", "cudnn", "splash")  # for values and gradients
FORWARD = ("xla", "fused")  # for values and derivatives in forward mode, jax.jvp

SMALL = 512  # tokens up to which XLA's matrix is small; also the most of a kernel's block
LANES = 128  # of a TPU's registers
VMEM = 12 * 2**20  # bytes of a TPU core's 16 MiB or more; the rest is for what is computed
MEND = "--model.attention=xla, or auto"
HIDDEN = -1e30  # the score of a key that is padding; finite, so that no difference is NaN

State = tuple[Array, ...]


def attention(q: Array, k: Array, v: Array, implementation: str = "xla") -> Array:
    """softmax(q kᵀ / √d) v, over all heads.

    Args:
      q, k, v: (n, tokens, heads, d), float32 or bfloat16.
      implementation: of REVERSE or FORWARD. `xla` gives every derivative; `cudnn` (GPUs, bfloat16
        or float16) and `splash` (TPUs) those of reverse mode; `fused` that of forward mode.
    Returns:
      (n, tokens, heads, d) of q's type.
    Raises:
      ValueError: no such implementation; or, by JAX, a derivative that this one does not have.
    """
    if implementation == "xla":
        return _xla(q, k, v)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation == "splash":
        return _splash(q, k, v)
    if implementation == "fused":
        return fused(q, k, v)
    raise ValueError(f"attention={implementation!r}: of {', '.join((*REVERSE, *FORWARD[1:]))}")


def reverse_attention(name: str, platform: str, dtype: str, tokens: int, d: int) -> str:
    """What `model.attention` stands for, "auto" resolved, of REVERSE.

    Args:
      name: of REVERSE, or "auto".
      platform: cpu, gpu (of those that cuDNN's attention runs on), other_gpu or tpu.
      dtype: of q, k and v.
      tokens, d: their length, and the width of a head.
    Raises:
      ValueError: the platform, type or width cannot do it; one line that names the mend.
    """
    for_cudnn = dtype in ("bfloat16", "float16") and d % 8 == 0 and d <= 128
    if name == "auto":
        if platform == "gpu" and for_cudnn:
            return "cudnn"
        return "splash" if platform == "tpu" and tokens > SMALL else "xla"
    if name == "cudnn" and platform != "gpu":
        raise ValueError(f"model.attention=cudnn needs a GPU, not {platform}: {MEND}")
    if name == "cudnn" and not for_cudnn:
        raise ValueError(
            "model.attention=cudnn needs bfloat16 and heads of a multiple of 8, at most 128, wide, "
            f"not {dtype} and {d}: --model.dtype=bfloat16, or {MEND}"
        )
    if name == "splash" and platform != "tpu":
        raise ValueError(f"model.attention=splash needs a TPU, not {platform}: {MEND}")
    return name


def forward_attention(name: str, platform: str, dtype: str, tokens: int, d: int) -> str:
    """What `model.attention_jvp` stands for, "auto" resolved, of FORWARD; see reverse_attention."""
    if name == "auto":
        return "fused" if platform == "tpu" and tokens > SMALL else "xla"
    return name


@functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
def _xla(q: Array, k: Array, v: Array) -> Array:
    """In XLA's form; of tokens × tokens the scores alone are kept for a pass backward."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


# Reverse mode on TPUs: the kernel that comes with JAX.


def _splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """Pallas' splash attention; tokens are padded to a multiple of its blocks, and masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    tokens, heads, d = q.shape[1:]
    padded = pl.cdiv(tokens, LANES) * LANES
    block = _block(padded)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    splash = kernel.make_splash_mha(
        mask.MultiHeadMask([mask.FullMask((padded, padded))] * heads),
        block_sizes=kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    real = (jnp.arange(padded) < tokens).astype(jnp.int32)
    segments = None if padded == tokens else kernel.SegmentIds(real, real)
    q = (q.astype(jnp.float32) / d**0.5).astype(q.dtype)
    q, k, v = (_by_head(x, padded) for x in (q, k, v))
    o = jax.vmap(lambda q, k, v: splash(q, k, v, segments))(q, k, v)
    return jnp.swapaxes(o, 1, 2)[:, :tokens]


def _block(tokens: int) -> int:
    """The most lanes, up to SMALL, that divide `tokens`."""
    return max(b for b in range(LANES, SMALL + 1, LANES) if tokens % b == 0)


def _by_head(x: Array, tokens: int) -> Array:
    """(n, t, heads, d) → (n, heads, tokens, d), zeros where there was nothing."""
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0))), 1, 2)


# Forward mode: value and tangent in one kernel.


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def fused(q: Array, k: Array, v: Array, block: int = 0) -> Array:
    """Attention whose value and tangent come from one kernel; `jax.grad` of it raises.

    On TPUs by Mosaic, on GPUs by Triton, elsewhere interpreted, which is slow.

    Args:
      q, k, v: (n, tokens, heads, d).
      block: queries and keys that are worked on at once; 0 chooses.
    """
    return _run(block, q, k, v)[0]


@fused.defjvp
def _value_and_tangent(block: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    o, do = _run(block, *primals, *tangents)
    return o, do


def _run(block: int, *inputs: Array) -> list[Array]:
    """(q, k, v) → [o]; (q, k, v, q̇, k̇, v̇) → [o, ȯ]; by the kernel of the platform."""
    return lax.platform_dependent(
        *inputs,
        tpu=functools.partial(_on_tpu, block),
        cuda=functools.partial(_on_gpu, block),
        default=functools.partial(_on_tpu, block, interpret=True),
    )


def _start(queries: int, d: int, tangent: bool) -> State:
    """What is kept before any key was seen, float32: m, w (queries, 1), a (queries, d); c, b."""
    column, rows = jnp.zeros((queries, 1), jnp.float32), jnp.zeros((queries, d), jnp.float32)
    return (column - jnp.inf, column, rows, *((column, rows) if tangent else ()))


def _seen(state: State, queries: list, keys: list, real: Array | None, d: int) -> State:
    """What is kept after a block of keys more.

    Args:
      state: m, w, a, and with tangents c, b, as in the module's docstring.
      queries: [q] or [q, q̇], (queries, d). keys: [k, v] or [k, v, k̇, v̇], (keys, d).
      real: how many of the keys are no padding, if any is; padding is zeros.
      d: the width of a head without padding.
    """
    (q, *dq), (k, v, *tangents) = queries, keys
    m, w, a, *cb = state
    s = _product(q, k, 1) / d**0.5
    if real is not None:
        s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < real, s, HIDDEN)
    m, old_m = jnp.maximum(m, s.max(axis=1, keepdims=True)), m
    shrink, e = jnp.exp(old_m - m), jnp.exp(s - m)
    w, old_w = w * shrink + e.sum(axis=1, keepdims=True), w * shrink
    a, old_a = a * shrink + _product(e.astype(v.dtype), v, 0), a * shrink
    if not tangents:
        return m, w, a
    (c, b), (dk, dv) = cb, tangents
    ds = (_product(dq[0], k, 1) + _product(q, dk, 1)) / d**0.5
    c, old_c = (c * old_w + (e * ds).sum(axis=1, keepdims=True)) / w, c
    b = b * shrink + (old_c - c) * old_a
    b += _product((e * (ds - c)).astype(v.dtype), v, 0) + _product(e.astype(dv.dtype), dv, 0)
    return m, w, a, c, b


def _result(state: State) -> list[Array]:
    """[o] or [o, ȯ] from what is kept after the last key."""
    _, w, a, *cb = state
    return [a / w, *(b / w for b in cb[1:])]


def _product(x: Array, y: Array, axis: int) -> Array:
    """x's columns against y's rows (axis 0) or columns (1): x y or x yᵀ, summed in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _on_tpu(block: int, *inputs: Array, interpret: bool = False) -> list[Array]:
    """The kernel for Mosaic: a grid of sample, heads, block of queries, block of keys.

    Arrays stay (n, tokens, heads · d), and a turn takes as many heads as fill whole registers, so
    that nothing is transposed or padded in memory. The grid's last axis is walked in order, and
    what is kept lies in scratch memory meanwhile.
    """
    from jax.experimental.pallas import tpu as pltpu

    n, tokens, heads, d = inputs[0].shape
    tangent = len(inputs) == 6
    together = LANES // math.gcd(d, LANES)
    together = heads if heads % together else together
    block = min(tokens, block or _tpu_block(tokens, together * d, inputs[0].dtype.itemsize))
    spec = functools.partial(pl.BlockSpec, (None, block, together * d))
    queries, keys = spec(lambda n, h, i, j: (n, i, h)), spec(lambda n, h, i, j: (n, j, h))
    kept = jax.eval_shape(lambda: _start(block, d, tangent))
    outputs = pl.pallas_call(
        functools.partial(_tpu_kernel, heads=together, tokens=tokens),
        grid=(n, heads // together, pl.cdiv(tokens, block), pl.cdiv(tokens, block)),
        in_specs=[queries, keys, keys] * (1 + tangent),
        out_specs=[queries] * (1 + tangent),
        out_shape=[jax.ShapeDtypeStruct((n, tokens, heads * d), inputs[0].dtype)] * (1 + tangent),
        scratch_shapes=[pltpu.VMEM((block, together * x.shape[1]), x.dtype) for x in kept],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="fused_attention_jvp" if tangent else "fused_attention",
    )(*(x.reshape(n, tokens, heads * d) for x in inputs))
    return [o.reshape(n, tokens, heads, d) for o in outputs]


def _tpu_block(tokens: int, width: int, itemsize: int) -> int:
    """Rows of a block, such that inputs and outputs, twice, and what is kept fit a core's VMEM."""
    most = VMEM // (width * (2 * 8 * itemsize + 2 * 4)) // LANES * LANES
    most = max(LANES, min(SMALL, most))
    if tokens <= most:
        return tokens
    return pl.cdiv(tokens, pl.cdiv(tokens, most) * LANES) * LANES


def _tpu_kernel(*refs: Any, heads: int, tokens: int) -> None:
    """A block of queries against a block of keys, head by head.

    Args:
      refs: q, k, v and their tangents, o and its own (block, heads · d); then what is kept, m, w
        and c (block, heads), a and b as o.
    """
    tangent = len(refs) == 13
    (q, k, v, *tangents), outputs, kept = (
        (refs[:6], refs[6:8], refs[8:]) if tangent else (refs[:3], refs[3:4], refs[4:])
    )
    (block, width), turn, last = q.shape, pl.program_id(3), pl.num_programs(3) - 1
    real = tokens - turn * block if tokens % block else None
    for head in range(heads):
        own = functools.partial(_columns, head, heads)

        @pl.when(turn == 0)
        def _(own=own):
            _write(own(kept), _start(block, width // heads, tangent))

        queries = [ref[...] for ref in own([q, *tangents[:1]])]
        keys = [_without_padding(ref[...], real) for ref in own([k, v, *tangents[1:]])]
        _write(own(kept), _seen(_read(own(kept)), queries, keys, real, width // heads))

        @pl.when(turn == last)
        def _(own=own):
            _write(own(outputs), _result(_read(own(kept))))


def _columns(head: int, heads: int, refs: Any) -> list:
    """A head's columns of each of `refs`."""
    widths = [ref.shape[1] // heads for ref in refs]
    return [ref.at[:, pl.ds(head * w, w)] for ref, w in zip(refs, widths, strict=True)]


def _read(refs: Any) -> State:
    return tuple(ref[...] for ref in refs)


def _write(refs: Any, values: Any) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value.astype(ref.dtype)


def _without_padding(x: Array, real: Array | None) -> Array:
    """(rows, d) with zeros below the `real` first rows, where anything may stand."""
    if real is None:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < real, x, jnp.zeros_like(x))


def _on_gpu(block: int, *inputs: Array, interpret: bool = False) -> list[Array]:
    """The kernel for Triton: a grid of sample, head, block of queries, and a loop over keys.

    Triton's tiles are powers of two: tokens and heads are padded to them.
    """
    from jax.experimental.pallas import triton

    n, tokens, heads, d = inputs[0].shape
    tangent = len(inputs) == 6
    block = block or 64
    padded, wide = pl.cdiv(tokens, block) * block, pl.next_power_of_2(max(d, 16))
    queries = pl.BlockSpec((None, block, None, wide), lambda n, h, i: (n, i, h, 0))
    keys = pl.BlockSpec((None, padded, None, wide), lambda n, h, i: (n, 0, h, 0))
    out = jax.ShapeDtypeStruct((n, padded, heads, wide), inputs[0].dtype)
    padding = ((0, 0), (0, padded - tokens), (0, 0), (0, wide - d))
    outputs = pl.pallas_call(
        functools.partial(_gpu_kernel, block=block, tokens=tokens, d=d),
        grid=(n, heads, padded // block),
        in_specs=[queries, keys, keys] * (1 + tangent),
        out_specs=[queries] * (1 + tangent),
        out_shape=[out] * (1 + tangent),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="fused_attention_jvp" if tangent else "fused_attention",
    )(*(jnp.pad(x, padding) for x in inputs))
    return [o[:, :tokens, :, :d] for o in outputs]


def _gpu_kernel(*refs: Any, block: int, tokens: int, d: int) -> None:
    """A block of queries against all keys, block by block; refs as the first of `_tpu_kernel`."""
    tangent = len(refs) == 8
    (q, k, v, *tangents), outputs = (refs[:6], refs[6:]) if tangent else (refs[:3], refs[3:])
    padded, wide = k.shape
    queries = [ref[...] for ref in (q, *tangents[:1])]

    def body(turn: Array, state: State) -> State:
        keys = [ref[pl.ds(turn * block, block), :] for ref in (k, v, *tangents[1:])]
        real = tokens - turn * block if tokens % block else None
        return _seen(state, queries, keys, real, d)

    state = lax.fori_loop(0, padded // block, body, _start(block, wide, tangent))
    _write(outputs, _result(state))
