"""The gradient of one batch does not depend on how it is cut into micro-batches and generations."""

import math

import pytest
import torch

from tests.support.training import Recorder, assert_same_gradients, fixed_completions, make_trainer, moved_policy
from trl_grpo_ext import GRPOExtTrainer, StepRewards


LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4, 8, 3, 5, 7]

# per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation
WHOLE = (12, 1, 1)
CUTS = [(6, 2, 2), (2, 6, 6), (6, 1, 2), (3, 2, 4)]
# Each micro-batch generated apart, a group at a time: TRL counts the tokens of each generation by itself
APART = (4, 3, 1)


def steps(completion_ids, row, **kwargs):
    """Two steps, or one where there is no room; no judgement of every fifth completion."""
    rewards = []
    for number, ids in zip(row, completion_ids, strict=True):
        ends = sorted({len(ids) // 2, len(ids) - 1})
        values = [math.sin(5.0 * number + 2.0 * end) for end in ends]
        rewards.append(None if number % 5 == 0 else StepRewards(ends, values))
    return rewards


def outcome(row, **kwargs):
    return [math.cos(3.0 * number) for number in row]


def mean_gradient(folder, output, cut, **config) -> dict[str, torch.Tensor]:
    """
    Of the optimizer steps that one batch is trained in, at a learning rate of 0: several where a generation lasts for
    more micro-batches than an optimizer step takes.
    """
    batch_size, accumulation, per_generation = cut
    recorder = Recorder()
    trainer = make_trainer(
        GRPOExtTrainer,
        moved_policy(folder),
        [steps, outcome],
        output,
        trainer_options={"rollout_func": fixed_completions(LENGTHS), "callbacks": [recorder]},
        supervision="process",
        kl_estimator="exact",
        beta=0.3,
        learning_rate=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_steps=len(LENGTHS) // (batch_size * accumulation),
        **config,
    )
    trainer.train()
    names = recorder.gradients[0].keys()
    return {name: torch.stack([g[name] for g in recorder.gradients]).mean(0) for name in names}


@pytest.mark.parametrize("kl_reduction", ["loss_type", "token_mean"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_is_the_same_for_every_cut(tiny_model, tmp_path, loss_type, kl_reduction):
    options = {"loss_type": loss_type, "kl_reduction": kl_reduction}
    expected = mean_gradient(tiny_model, tmp_path, WHOLE, **options)
    counts_tokens = loss_type == "dapo" or kl_reduction == "token_mean"
    for cut in CUTS if counts_tokens else [*CUTS, APART]:
        assert_same_gradients(mean_gradient(tiny_model, tmp_path, cut, **options), expected, 1e-5)
