"""Small runs that log credit, and every form of the sum that makes an advantage."""

from tests.support import distributed_worker
from tests.support.training import RecordingExtTrainer, fixed_completions, make_trainer
from trl_grpo_ext.credit.read import read_credit


EVERY_FORM = [
    *[
        {"advantage_estimator": estimator, "scale_rewards": scale, "multi_objective_aggregation": order}
        for estimator in ("position", "pooled", "step", "min")
        for order, scales in (("sum_then_normalize", ["group", "batch", "none"]), ("normalize_then_sum", ["group"]))
        for scale in scales
    ],
    {"position_baseline": "active", "gamma_unit": "step"},
    {"position_baseline": "leave_one_out", "gamma": [0.9, 1.0]},
    {"supervision": "outcome"},
    {"supervision": "outcome", "advantage_eps": 1e-8, "multi_objective_aggregation": "normalize_then_sum"},
]


def credit_of(model, folder, rewards=(distributed_worker.steps, distributed_worker.outcome), rows=None, **config):
    """A trainer that has trained, and the recorded steps."""
    rows = rows or fixed_completions(distributed_worker.LENGTHS)
    trainer = make_trainer(
        config.pop("trainer_class", RecordingExtTrainer),
        model,
        list(rewards),
        folder,
        trainer_options={"rollout_func": rows},
        **{
            "per_device_train_batch_size": len(rows.completion_ids),
            "supervision": "process",
            "max_steps": 1,
            "log_credit": 2,
        }
        | config,
    )
    trainer.train()
    log = read_credit(folder)
    assert log.passed_over == {}
    return trainer, [step.rows() for step in log.steps]
