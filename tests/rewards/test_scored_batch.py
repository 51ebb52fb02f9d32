"""Which completions a process gets to know, and at what cost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.advantages.batches import few
from tests.support.threads import in_threads
from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import ESTIMATORS, Estimator, GRPOExtTrainer, distributed
from trl_grpo_ext.advantages.combine import WHOLE_BATCH
from trl_grpo_ext.rewards.scored_batch import share_of, token_rewards


class Process:
    """What is asked of an accelerator, for one of several processes."""

    def __init__(self, index, count, gather):
        self.process_index = index
        self.num_processes = count
        self.gathered = []
        self._gather = gather

    def gather(self, values):
        self.gathered.append(tuple(values.shape))
        return self._gather(values)

    def reduce(self, values, reduction):
        return self._gather(values[None]).sum(0)

    def pad_across_processes(self, values, dim, pad_index):
        longest = int(self._gather(torch.tensor([values.size(dim)])).max())
        return F.pad(values, (0, longest - values.size(dim)), value=pad_index)


@few
@given(
    seed=st.integers(0, 2**31),
    processes=st.integers(1, 4),
    group_size=st.integers(1, 6),
    groups=st.integers(1, 4),
    at_once=st.sampled_from([1, 2**25]),
)
def test_a_process_gets_the_groups_that_its_own_completions_lie_in(seed, processes, group_size, groups, at_once):
    torch.manual_seed(seed)
    rows = math.lcm(group_size, processes) * groups
    own_count = rows // processes
    lengths = torch.randint(1, 6, (processes,)).tolist()
    masks = [(torch.rand(own_count, length) < 0.8).long() for length in lengths]
    scores_NK = torch.randn(rows, 2)
    longest = max(lengths)
    mask_NT = torch.cat([F.pad(mask, (0, longest - mask.size(1))) for mask in masks]).bool()
    last_NT = mask_NT & (mask_NT.cumsum(1) == mask_NT.sum(1, keepdim=True))

    def run(index, gather):
        process = Process(index, processes, gather)
        rewards = token_rewards(process, [None, None], scores_NK, masks[index], group_size)
        return process, rewards, share_of(process, rewards.rows, rows, group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_GATHERED_BYTES", at_once)
        found = in_threads(processes, run)
    for index, (process, rewards, (own, share)) in enumerate(found):
        first = index * own_count // group_size * group_size
        stop = -(-(index + 1) * own_count // group_size) * group_size
        assert rewards.rows == range(first, stop)
        assert torch.equal(rewards.mask_NT, mask_NT[first:stop])
        # A score stands on the last loss token
        expected_KNT = scores_NK.T[:, :, None].where(last_NT, torch.nan)[:, first:stop]
        torch.testing.assert_close(rewards.rewards_KNT, expected_KNT, rtol=0, atol=0, equal_nan=True)
        assert range(first, stop)[own] == range(index * own_count, (index + 1) * own_count)
        # Whether statistics are shared must be known alike to all
        assert (share is WHOLE_BATCH) is (group_size == rows)
        assert own_count % group_size or process.gathered == []
        assert at_once > 1 or all(shape[0] == 1 for shape in process.gathered)


def advantages_of_row(inputs):
    return inputs.values_NT


@pytest.mark.parametrize("overridden", [None, "compute_advantages", "reward_metrics", "an estimator"])
def test_what_is_the_users_own_gets_the_completions_of_all_processes(tiny_model, tmp_path, monkeypatch, overridden):
    monkeypatch.setitem(ESTIMATORS, "mine", Estimator(advantages_of_row))
    members = {} if overridden in (None, "an estimator") else {overridden: lambda trainer, batch: None}
    trainer_class = type("Own", (GRPOExtTrainer,), members)
    estimator = "mine" if overridden == "an estimator" else "position"
    trainer = make_trainer(
        trainer_class, tiny_model, [lambda prompts, **columns: [1.0] * len(prompts)], tmp_path,
        trainer_options={"rollout_func": fixed_completions([2, 3, 2, 3])}, supervision="process",
        advantage_estimator=estimator, per_device_train_batch_size=4,
    )  # fmt: skip
    assert trainer._needs_whole_batch is (overridden is not None)
