"""Blocks of groups, and processes that know their own groups only, compute what one does of the whole batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.advantages.batches import ORDERS, UNITS, Batch, every_estimator, every_order, few
from tests.support import oracles
from tests.support.threads import in_threads
from trl_grpo_ext.advantages import combine
from trl_grpo_ext.advantages.combine import Share, process_advantages
from trl_grpo_ext.advantages.normalization import Moments, merged, weighted_moments
from trl_grpo_ext.advantages.settings import AdvantageSettings
from trl_grpo_ext.distributed import group_rows


# A processor's cache holds more than these
block_tokens = st.sampled_from([1, 30, 2**20])


def advantages_of_process(batch, options, own, share):
    """What a process computes whose own completions are in those rows of the batch, from their groups alone."""
    rows = group_rows(own, batch.group_size)
    advantages = process_advantages(
        torch.tensor(batch.rewards[:, rows.start : rows.stop], dtype=torch.float32),
        torch.tensor(batch.mask[rows.start : rows.stop]),
        torch.tensor(batch.weights),
        batch.group_size,
        AdvantageSettings(**options),
        share=share(slice(own.start - rows.start, own.stop - rows.start)),
        dtype=torch.float64,
    )
    return advantages[own.start - rows.start : own.stop - rows.start].numpy()


@every_estimator
@settings(few, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    sources=st.integers(1, 3),
    processes=st.integers(1, 4),
    per_process=st.integers(1, 6),
    group_size=st.integers(1, 6),
    length=st.integers(1, 8),
    tokens=block_tokens,
    # Two passes are what can go wrong
    scale=st.sampled_from(["batch", "batch", "group", "none"]),
    order=st.sampled_from(ORDERS),
    unit=st.sampled_from(UNITS),
)
def test_blocks_and_processes_change_nothing(
    seed, sources, processes, per_process, group_size, length, tokens, estimator, scale, order, unit
):
    # As many rows as both groups and processes divide
    rows = np.lcm(group_size, processes) * per_process
    batch = Batch(seed, sources, rows // group_size, group_size, length)
    # What float32 holds
    batch.rewards = batch.rewards.astype(np.float32).astype(np.float64)
    options = batch.options(estimator, scale, order, unit)
    whole = process_advantages(
        *(torch.tensor(values) for values in (batch.rewards, batch.mask, batch.weights)),
        group_size,
        AdvantageSettings(**options),
    )
    expected = batch.oracle(options)

    def run(process, gather):
        own = range(process * rows // processes, (process + 1) * rows // processes)
        return advantages_of_process(batch, options, own, lambda own_rows: Share(own_rows, gather))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combine, "_BLOCK_TOKENS", tokens)
        found = np.concatenate(in_threads(processes, run))
    np.testing.assert_allclose(found, whole.numpy(), rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(1.0, np.abs(expected).max()))


@every_order
@every_estimator
@pytest.mark.parametrize("processes", [1, 2])
def test_a_group_of_short_completions_is_in_the_batchs_statistics_of_later_tokens(
    estimator, order, processes, monkeypatch
):
    """Where completions that have ended count as return 0, those of a block whose completions are all short do."""
    monkeypatch.setattr(combine, "_BLOCK_TOKENS", 1)
    batch = Batch(seed=3, sources=2, groups=4, group_size=4, length=9)
    batch.mask = (np.arange(9) < np.array([2, 5, 9, 3]).repeat(4)[:, None]).astype(np.int64)
    batch.rewards = batch.rng.normal(size=batch.rewards.shape).astype(np.float32).astype(np.float64)
    options = batch.options(estimator, "batch", order)

    def run(process, gather):
        own = range(process * 16 // processes, (process + 1) * 16 // processes)
        return advantages_of_process(batch, options, own, lambda own_rows: Share(own_rows, gather))

    found = np.concatenate(in_threads(processes, run))
    np.testing.assert_allclose(found, batch.oracle(options), rtol=0, atol=1e-10)


@few
@given(seed=st.integers(0, 2**32 - 1), mean=st.sampled_from([0.0, 1e6]))
def test_moments_of_parts_are_those_of_the_whole(seed, mean):
    """Also where a difference of the sums would be rounding alone."""
    rng = np.random.default_rng(seed)
    values = mean + rng.normal(size=(5, 6, 4))
    weights = rng.integers(0, 2, size=values.shape).astype(float)
    pairs_of_parts = zip(torch.tensor(values)[:, None], torch.tensor(weights)[:, None], strict=True)
    parts = [weighted_moments(part, of_part, (0, 1)) for part, of_part in pairs_of_parts]
    found = merged(Moments(*[torch.cat(one) for one in zip(*parts, strict=True)]))
    for t in range(4):
        pairs = list(zip(values[:, :, t].ravel().tolist(), weights[:, :, t].ravel().tolist(), strict=True))
        expected_mean, expected_std, flat = oracles.moments(pairs)
        assert found.has_spread[0, 0, t].item() is not flat
        np.testing.assert_allclose(found.mean[0, 0, t], expected_mean, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(found.std[0, 0, t], expected_std, rtol=1e-9 if mean else 1e-12)
