"""Three devices of JAX, for `test_all_reduce.py`: each result and gradient against that of one device."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import anynorm

mesh = Mesh(np.asarray(jax.devices()), ("replica",))
own, everywhere = PartitionSpec("replica"), PartitionSpec()


def all_reduce(array):
    return jax.lax.psum(array, "replica")


def norm(x, gamma, beta, mask, **options):
    return anynorm.batch_norm(x, gamma, beta, weights=mask, return_moments=True, **options)


@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=(own, everywhere, everywhere, own), out_specs=(own, everywhere))
def synchronized(x, gamma, beta, mask):
    y, moments = norm(x, gamma, beta, mask, all_reduce=all_reduce)
    return y, (moments.mean, moments.var, moments.count)


@jax.jit
@partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(own, everywhere, everywhere, own, own),
    out_specs=(own, everywhere, everywhere),
)
def pulled(x, gamma, beta, mask, dy):
    return anynorm.vjp(anynorm.batch_norm, x, gamma, beta, weights=mask, all_reduce=all_reduce)[1](dy)


def main():
    assert len(jax.devices()) == 3
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 6, 3, 4))
    gamma, beta = rng.standard_normal((2, 3))
    mask = np.asarray([4, 3, 0, 0, 1, 2])[:, None, None] > np.arange(4)  # the second device has nothing but padding
    x, dy = np.where(mask, x, np.nan), np.where(mask, dy, 0)
    x, dy, gamma, beta, mask = map(jnp.asarray, (x, dy, gamma, beta, mask))
    expected, batch = norm(x, gamma, beta, mask)
    y, moments = synchronized(x, gamma, beta, mask)
    close((y, *moments), (expected, batch.mean, batch.var, batch.count))

    expected = anynorm.vjp(anynorm.batch_norm, x, gamma, beta, weights=mask)[1](dy)
    close(pulled(x, gamma, beta, mask, dy), expected)
    _, pullback = jax.vjp(lambda *arrays: synchronized(*arrays, mask)[0], x, gamma, beta)
    close(pullback(dy), expected)

    text = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()
    section = re.search(r"^### JAX$(.*?)\Z", text, re.MULTILINE | re.DOTALL)[1]
    x = jnp.nan_to_num(x)
    names = {"anynorm": anynorm, "mesh": mesh, "x": x, "gamma": gamma, "beta": beta, "dy": dy}
    exec(re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1], names)
    close([names["y"]], [anynorm.batch_norm(x, gamma, beta)])
    expected = anynorm.vjp(anynorm.batch_norm, x, gamma, beta)[1](dy)
    close([names["dx"], names["dgamma"], names["dbeta"]], expected)

    @partial(jax.pmap, axis_name="replica", in_axes=(0, None, None, 0))
    def mapped(x, gamma, beta, mask):
        return norm(x, gamma, beta, mask, all_reduce=all_reduce)[0]

    y, _ = synchronized(x, gamma, beta, mask)
    parts = (x.reshape(3, 2, 3, 4), gamma, beta, mask.reshape(3, 2, 1, 4))
    close((mapped(*parts).reshape(x.shape),), (y,))

    @partial(jax.pmap, axis_name="replica", in_axes=(0, None, None, 0, 0))
    def inside(x, gamma, beta, mask, dy):
        _, pullback = jax.vjp(lambda *arrays: norm(*arrays, mask, all_reduce=all_reduce)[0], x, gamma, beta)
        return pullback(dy)

    dx, *own_parts = inside(*parts, dy.reshape(parts[0].shape))
    expected = anynorm.vjp(anynorm.batch_norm, x, gamma, beta, weights=mask)[1](dy)
    close([dx.reshape(x.shape), *(each.sum(axis=0) for each in own_parts)], expected)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-9, atol=1e-9)


main()
