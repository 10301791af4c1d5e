"""Laws of time, and which samples span an interval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flows import times
from utils import data
from utils.sources import ArraySource


def draw(law, n=20_000):
    return jax.vmap(law)(jax.random.split(jax.random.key(0), n))


def test_logit_normal_has_its_law():
    t = draw(times.logit_normal(-0.4, 1.0))
    assert stats.kstest(jax.scipy.special.logit(t), stats.norm(-0.4, 1.0).cdf).pvalue > 0.01


def test_uniform_has_its_law():
    assert stats.kstest(draw(times.uniform()), stats.uniform.cdf).pvalue > 0.01


def test_interval_orders_two_independent_draws():
    r, t = draw(times.interval(times.uniform()))
    assert (r <= t).all()
    assert stats.kstest(t, lambda x: x**2).pvalue > 0.01  # the larger of two uniforms
    assert stats.kstest(r, lambda x: 1 - (1 - x) ** 2).pvalue > 0.01


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("batch", [12, 64, 600])
def test_share_is_that_of_the_global_batch(share, batch):
    spans = times.spans_interval(jnp.arange(batch), share)
    assert int(spans.sum()) == pytest.approx(share * batch, abs=1)
    if (share * batch) % 1 == 0 and batch == 600:
        assert int(spans.sum()) == round(share * batch)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_share_splits_evenly_over_hosts_and_devices(hosts):
    source = ArraySource(np.zeros((10, 1), np.float32), np.zeros(10, np.int32))
    for host in range(hosts):
        batch = next(data.batches(source, batch_size=64, seed=0, shard=(host, hosts)))
        spans = np.asarray(times.spans_interval(jnp.asarray(batch["position"]), 0.25))
        assert (spans.reshape(8, -1).sum(1) == 16 // 8 // hosts).all() or hosts == 4
        assert spans.sum() == 16 // hosts


def test_a_pattern_of_position_alone():
    whole = times.spans_interval(jnp.arange(64), 0.25)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(times.spans_interval(jnp.asarray(order), 0.25), whole[order])
