"""Batches for the tests of advantages: every combination of options, on random ragged completions and on outcomes."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.support import oracles
from trl_grpo_ext.advantages.combine import process_advantages
from trl_grpo_ext.advantages.settings import AdvantageSettings


# "position-active" is the estimator "position" with that baseline.
LABELS = ["position-all", "position-active", "position-leave_one_out", "pooled", "step", "min"]
SCALES = ["group", "batch", "none"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
UNITS = ["token", "step", "turn"]

few = settings(derandomize=True, deadline=None, max_examples=12)
every_estimator = pytest.mark.parametrize("estimator", LABELS)
every_scale = pytest.mark.parametrize("scale", SCALES)
every_order = pytest.mark.parametrize("order", ORDERS)
every_unit = pytest.mark.parametrize("unit", UNITS)


def computed(rewards_KNT, mask_NT, weights_K, group_size, **settings):
    """The package's advantages, with its settings as keywords."""
    return process_advantages(rewards_KNT, mask_NT, weights_K, group_size, AdvantageSettings(**settings))


class Batch:
    """A random batch of K sources with its weights and discounts; `run` and `oracle` take the same options."""

    def __init__(self, seed, sources, groups, group_size, length):
        self.rng = np.random.default_rng(seed)
        self.group_size = group_size
        self.rewards, self.mask = oracles.ragged_batch(self.rng, sources, groups, group_size, length)
        self.weights = self.rng.choice([-0.5, 0.25, 1.0, 2.0], size=sources)
        self.gammas = self.rng.choice([0.0, 0.5, 0.9, 1.0], size=sources).tolist()
        self.eps = float(self.rng.choice([1e-8, 1e-4, 0.1]))

    def options(self, estimator, scale="group", order="sum_then_normalize", unit="token"):
        estimator, _, baseline = estimator.partition("-")
        one_gamma = order == "sum_then_normalize" and estimator in ("pooled", "step")
        return {
            "estimator": estimator,
            "gamma": self.gammas[0] if one_gamma else self.gammas,
            "gamma_unit": unit,
            "options": {"position_baseline": baseline or "all"},
            "aggregation": order,
            "scale": scale,
            "eps": self.eps,
        }

    def run(self, options, rewards=None, mask=None, weights=None, group_size=None):
        advantages = computed(
            torch.tensor(self.rewards if rewards is None else rewards),
            torch.tensor(self.mask if mask is None else mask),
            torch.tensor(self.weights if weights is None else weights),
            group_size or self.group_size,
            **options,
        )
        return advantages.numpy()

    def oracle(self, options):
        options = options.copy()
        baseline = options.pop("options")["position_baseline"]
        return oracles.process_advantages(
            self.rewards, self.mask, self.weights, self.group_size, baseline=baseline, **options
        )


batches = st.builds(
    Batch,
    seed=st.integers(0, 2**32 - 1),
    sources=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 5),
    length=st.integers(1, 8),
)


def advantages_of(rewards_NT, mask_NT, group_size, *, estimator, gamma=1.0, weight=1.0, **options):
    """Advantages of a single source as float64; "position-active" is estimator "position" with that baseline."""
    estimator, _, baseline = estimator.partition("-")
    rewards = torch.as_tensor(np.asarray(rewards_NT)[None])
    weights = torch.tensor([weight], dtype=rewards.dtype)
    advantages = computed(
        rewards,
        torch.as_tensor(np.asarray(mask_NT)),
        weights,
        group_size,
        estimator=estimator,
        gamma=gamma,
        options={"position_baseline": baseline or "all"},
        **options,
    )
    return advantages.double().numpy()


def outcome(values_N, lengths_N, dtype=np.float64):
    """Rewards on the last token of completions of the given lengths, and their mask."""
    width = max(lengths_N)
    rewards = np.full((len(values_N), width), np.nan, dtype=dtype)
    rewards[np.arange(len(values_N)), np.asarray(lengths_N) - 1] = values_N
    return rewards, (np.arange(width) < np.asarray(lengths_N)[:, None]).astype(np.int64)
