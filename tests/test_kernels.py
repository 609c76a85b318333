"""Fused attention kernels against `attend`: in one call, and through whole models. cuDNN's own kernel needs a GPU; what
is held here is the call (jax.nn.dot_product_attention, computed by XLA). Splash attention is interpreted, and compiled
for a TPU."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_params
from jax.sharding import NamedSharding, PartitionSpec

from nla_jax.models.attention import Segment, attend, causal_mask
from nla_jax.models.kernels import attend_by, with_kernel
from nla_jax.models.sharding import make_mesh
from nla_jax.models.transformer import Transformer
from nla_jax.runtime.errors import InputError
from nla_jax.tools.hlo import Program
from nla_jax.tools.topology import mesh_over, slice_named

KERNELS = ("cudnn", "splash")


@pytest.fixture(autouse=True)
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked for, computed by XLA; and refused where cuDNN would refuse it."""
    computed = jax.nn.dot_product_attention

    def asked(q, k, v, *, implementation, **options):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
        return computed(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", asked)


def read(attention, window, q, kv):
    """Queries behind a shared prefix and a prompt that three rows share."""
    starts = np.cumsum([0, *(k.shape[2] for k, _ in kv)])
    masks = [np.ones((1, 1, k.shape[2]), bool) for k, _ in kv[:-1]] + [causal_mask(q.shape[1])]
    if window is not None:
        distance = starts[-2] + np.arange(q.shape[1])[:, None] - np.arange(starts[-1])
        masks = [mask & (distance[None, :, a:b] < window) for mask, a, b in zip(masks, starts, starts[1:])]
    segments = [Segment(k, v, mask) for (k, v), mask in zip(kv, masks)]
    return attention(q, segments)


@pytest.mark.parametrize("kernel, cap", [("cudnn", None), ("splash", None), ("splash", 2.0)])
@pytest.mark.parametrize("window", [None, 6])
def test_kernels_equal_attend(kernel, window, cap):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    B, T, M, N, H = 6, 5, 4, 2, 8
    q, kv = draw(B, T, M, H), [(draw(b, N, S, H), draw(b, N, S, H)) for b, S in ((1, 4), (2, 3), (B, T))]

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, q, kv):
        def loss(q, kv):
            out = read(attention, window, q, kv)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.grad(loss, (0, 1), has_aux=True)(q, kv)

    fused = lambda q, segments: attend_by(kernel, q, segments, window, 0.7, cap)
    close(run(fused, q, kv), run(lambda q, segments: attend(q, segments, 0.7, cap), q, kv), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)])
def test_models_compute_the_same(kernel, sizes):
    """Layers with and without a window, three parts of a text, a mesh that cuts one of them."""
    config = dataclasses.replace(TINY, window=5, local=(True, False, True), remat="dots_with_no_batch_dims_saveable")
    params, rng = random_params(config), np.random.default_rng(1)
    parts = [rng.normal(size=(b, t, TINY.width)).astype(np.float32) for b, t in ((1, 3), (2, 4), (4, 6))]

    def run(name):
        model = Transformer(dataclasses.replace(config, attention=name))

        def loss(blocks, parts):
            states, _ = model.apply({"params": params | {"blocks": blocks}}, parts)
            return sum(jnp.sum(jnp.sin(x)) for x in states), states

        with jax.set_mesh(make_mesh(*sizes)):
            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params["blocks"], parts)

    close(run(kernel), run("xla"), 2e-5)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the libtpu wheel is not installed")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash_compiles_for_a_tpu(head_dim):
    place = slice_named("v5p:2x2x1")
    mesh = mesh_over(place.devices, (1, 4, 1))
    shape = lambda b, *s: jax.ShapeDtypeStruct(
        (b, *s), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp" if b > 1 else None))
    )
    q, kv = shape(8, 150, 4, head_dim), [(shape(b, 2, s, head_dim),) * 2 for b, s in ((1, 100), (8, 150))]
    fused = lambda q, segments: attend_by("splash", q, segments, None, 1.0, None)
    loss = lambda q, kv: jnp.sum(read(fused, None, q, kv).astype(jnp.float32))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(q, kv).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    # Of 256 positions as one block: 2 + 3 + 4 products of each of the 2 rows a device, 4 heads.
    assert Program(text).counts.flops == 9 * 2 * 2 * 4 * head_dim * 256**2


def test_what_a_kernel_cannot_do_is_refused():
    with pytest.raises(InputError, match="no attention 'flash'; there are xla, cudnn, splash"):
        with_kernel(TINY, "flash")
    with pytest.raises(InputError, match="'splash' runs on a TPU, these devices are of kind CPU"):
        with_kernel(TINY, "splash")
    assert with_kernel(TINY, "xla").attention == "xla"


def test_what_cudnn_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="not in float32"):
        with_kernel(TINY, "cudnn")
    half = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    with pytest.raises(InputError, match="no soft cap"):
        with_kernel(dataclasses.replace(half, attention_cap=50.0), "cudnn")
    assert with_kernel(half, "cudnn").attention == "cudnn"
