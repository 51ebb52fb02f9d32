"""
The detailed loop that the package started from (a GRPO loop in pseudo-code with process supervision and an exact KL),
computed in float64 by `tests.oracles`, equals what the trainer does under the settings that stand for it.
"""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.oracles import seed_loss, seed_loss_gradient, seed_process_advantages
from tests.support.training import (
    FixedCompletions,
    Recorder,
    RecordingExtTrainer,
    assert_same_gradients,
    dense_logits,
    fixed_completions,
    gradients,
    make_trainer,
)


BETA, GAMMA, EPSILON, MAX_LENGTH, GROUP = 0.2, 0.99, 0.2, 12, 4
WEIGHTS = [0.7, 1.8]


def token_rewards(source: int, row: int, length: int) -> list[float]:
    return [math.sin(1.0 + 7 * source + 3.0 * row + 1.7 * t) for t in range(length)]


def first(completion_ids, row, **kwargs):
    return [token_rewards(0, number, len(ids)) for number, ids in zip(row, completion_ids, strict=True)]


def second(completion_ids, row, **kwargs):
    return [token_rewards(1, number, len(ids)) for number, ids in zip(row, completion_ids, strict=True)]


def padded(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Rows of any length, with NaN after their ends: what is read there shows in the result."""
    result = np.full((len(rows), width, *rows[0].shape[1:]), np.nan)
    for row, values in enumerate(rows):
        result[row, : len(values)] = values
    return result


class SeedLoop:
    """The oracle's inputs for given completions, and its results for given weights."""

    def __init__(self, folder: str, rows: FixedCompletions):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.rows = rows
        lengths = [len(ids) for ids in rows.completion_ids]
        self.width = max(lengths)
        self.mask = np.arange(self.width)[None, :] < np.array(lengths)[:, None]
        self.tokens = padded([np.array(ids, dtype=float) for ids in rows.completion_ids], self.width)
        self.tokens = np.nan_to_num(self.tokens).astype(int)
        rewards = [
            padded([np.array(token_rewards(k, row, length)) for row, length in enumerate(lengths)], self.width)
            for k in (0, 1)
        ]
        self.advantages = seed_process_advantages(rewards, self.mask, WEIGHTS, GROUP, GAMMA)
        self.ref_logits = self.as_array(self.logits())
        self.old_logps = self.logps()

    def logits(self) -> list[torch.Tensor]:
        return [dense_logits(self.model, self.rows, row, 1.0) for row in range(len(self.rows.completion_ids))]

    def as_array(self, logits: list[torch.Tensor]) -> np.ndarray:
        return padded([values.detach().numpy() for values in logits], self.width)

    def logps(self) -> np.ndarray:
        tokens = [torch.tensor(ids)[:, None] for ids in self.rows.completion_ids]
        logps = [
            values.log_softmax(-1).gather(1, ids)[:, 0] for values, ids in zip(self.logits(), tokens, strict=True)
        ]
        return self.as_array(logps)

    def at(self, weights: dict[str, torch.Tensor]):
        """Loss, its policy and KL parts, and the gradient in the weights, of one inner update from these weights."""
        self.model.load_state_dict(weights)
        self.model.zero_grad()
        logits = self.logits()
        arguments = (self.as_array(logits), self.ref_logits, self.tokens, self.old_logps, self.advantages, self.mask)
        options = {"epsilon": EPSILON, "beta": BETA, "max_len": MAX_LENGTH}
        gradient = torch.tensor(seed_loss_gradient(*arguments, **options))
        torch.autograd.backward(logits, [g[: len(z)] for g, z in zip(gradient, logits, strict=True)])
        return *seed_loss(*arguments, **options), gradients(self.model)


@pytest.mark.parametrize("lengths", [[9] * 8, [3, 9, 5, 7, 1, 4, 8, 2]], ids=["equal_lengths", "different_lengths"])
def test_reduces_to_the_seed_documents_loop(tiny_model, tmp_path, lengths):
    """Advantages, loss, both its terms and the gradient at each of three inner updates on one batch."""
    rows, recorder = fixed_completions(lengths), Recorder()
    trainer = make_trainer(
        RecordingExtTrainer,
        tiny_model,
        [first, second],
        tmp_path,
        trainer_options={"rollout_func": rows, "callbacks": [recorder]},
        supervision="process",
        advantage_estimator="position",
        gamma=GAMMA,
        advantage_eps=1e-8,
        reward_weights=WEIGHTS,
        loss_type="dr_grpo",
        kl_estimator="exact",
        kl_reduction="token_mean",
        beta=BETA,
        epsilon=EPSILON,
        temperature=1.0,
        max_completion_length=MAX_LENGTH,
        num_iterations=3,
        max_steps=3,
        learning_rate=0.1,
        per_device_train_batch_size=8,
    )
    trainer.train()

    seed = SeedLoop(tiny_model, rows)
    (batch,) = trainer.batches
    np.testing.assert_allclose(batch["advantages"].numpy() * seed.mask, seed.advantages * seed.mask, rtol=0, atol=1e-5)
    for step in range(3):
        log = trainer.state.log_history[step]
        loss, policy_loss, kl, gradient = seed.at(recorder.weights[step])
        assert log["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert log["policy_loss"] == pytest.approx(policy_loss, rel=1e-5, abs=1e-7)
        assert log["kl_loss"] == pytest.approx(BETA * kl, rel=1e-5, abs=1e-8)
        assert_same_gradients(recorder.gradients[step], gradient, 1e-4)
    assert log["clip_ratio/region_mean"] > 0.02
    assert log["kl_loss"] > 1e-3
