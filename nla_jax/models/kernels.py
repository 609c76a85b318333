"""Attention by kernels that never write scores to memory: cuDNN's on NVIDIA GPUs, Pallas' splash attention on TPUs.

They need one contiguous causal sequence per row, so segments are joined and those of smaller batches repeated. Tests
compare them with `attend`. Sampling always uses `attend`: with one query per text there is nothing to fuse.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from nla_jax.models.attention import SAVED, Queries, Segment
from nla_jax.models.sharding import batch_axes
from nla_jax.runtime.errors import InputError

PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # where each kernel runs; "xla", which is `attend`, runs everywhere
LANES = 128  # the positions of splash attention come in multiples of this
Keys = Float[Array, "B N T H"]


def with_kernel(config, name: str, mesh: Mesh | None = None):
    """A `TransformerConfig` whose attention is computed by `name` on the devices of a mesh (None: the default ones).
    Raises `InputError` if there is no such kernel, or if it cannot do what the model needs on these devices."""
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    if name not in ("xla", *PLATFORMS):
        raise InputError(f"There is no attention {name!r}; there are xla, {', '.join(PLATFORMS)}.")
    if platform != PLATFORMS.get(name, platform):
        wanted, found = PLATFORMS[name].upper(), platform.upper()
        raise InputError(f"Attention {name!r} runs on a {wanted}, these devices are of kind {found}; choose 'xla'.")
    dtype = jnp.dtype(config.dtype)
    if name == "cudnn" and dtype.itemsize != 2:
        raise InputError(f"Attention 'cudnn' computes in bfloat16 or float16, not in {dtype}; choose 'xla'.")
    if name == "cudnn" and config.attention_cap is not None:
        raise InputError("Attention 'cudnn' has no soft cap, which this model's attention needs; choose 'xla'.")
    return dataclasses.replace(config, attention=name)


def attend_by(
    kernel: str, q: Queries, segments: Sequence[Segment], window: int | None, scale: float, cap: float | None
) -> Queries:
    """The result of `attend` for segments that follow one another, the last with the queries' own keys. A query reads
    all positions up to its own, or the last `window` of them.

    Queries are padded on the left to a square, so that the kernel can skip the upper triangle; this part is dropped."""
    join = lambda xs: jnp.concatenate([jnp.repeat(x, len(q) // len(x), 0) for x in xs], 2)
    k, v = join([s.k for s in segments]), join([s.v for s in segments])
    past = k.shape[2] - q.shape[1]
    q = jnp.pad(q, ((0, 0), (past, 0), (0, 0), (0, 0)))
    return {"cudnn": _cudnn, "splash": _splash}[kernel](q, k, v, window, scale, cap)[:, past:]


def _cudnn(q: Queries, k: Keys, v: Keys, window: int | None, scale: float, cap: float | None) -> Queries:
    T = q.shape[1]
    even = [jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, *(jnp.swapaxes(x, 1, 2) for x in (k, v)))]
    out = jax.nn.dot_product_attention(  # differentiates at even lengths only
        *even, scale=scale, is_causal=True, local_window_size=window and (window - 1, 0), implementation="cudnn"
    )
    return out[:, :T]


def _splash(q: Queries, k: Keys, v: Keys, window: int | None, scale: float, cap: float | None) -> Queries:
    """Each device computes the texts that it holds. On a CPU the kernel is interpreted, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (B, T, M, H), N = q.shape, k.shape[1]
    length = -(-T // LANES) * LANES
    block = next(n for n in (512, 256, LANES) if length % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": block for name in names})
    square = (length, length)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    masks = splash.MultiHeadMask([mask] * (M // N))
    kernel = functools.partial(
        splash.make_splash_mqa_single_device,
        masks,
        block_sizes=blocks,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=SAVED,
    )

    def local(q, k, v):
        by = lambda interpret: lambda q, k, v: jax.vmap(jax.vmap(kernel(interpret=interpret)))(q, k, v)
        return jax.lax.platform_dependent(q, k, v, cpu=by(True), default=by(False))

    pad = lambda x, axis: jnp.pad(x, [(0, length - T) if i == axis else (0, 0) for i in range(x.ndim)])
    heads = jnp.moveaxis((q * scale).reshape(B, T, N, M // N, H), 1, 3)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = PartitionSpec(batch_axes(mesh, B) or None)
        local = jax.shard_map(local, in_specs=(rows,) * 3, out_specs=rows, check_vma=False)
    out = local(pad(heads, 3), pad(k, 2), pad(v, 2))[..., :T, :]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, M, H).astype(q.dtype)
