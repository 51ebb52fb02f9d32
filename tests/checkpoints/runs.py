"""Short runs that save a checkpoint after every step, and what two runs have to agree on."""

from typing import Any

import torch
from peft import LoraConfig

from tests.support.adapters import CONTINUED, LORA, trained_adapter
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.checkpoints.manifest import read_manifest


STEPS = 7
SYNC = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
# The comments say after how many steps an epoch ends: all but the first kind reach the third epoch
SETTINGS: dict[str, dict[str, Any]] = {
    # 6
    "lora": {**SYNC, "kl_estimator": "exact", "num_iterations": 3},
    # 2
    "continued": {**SYNC, "kl_estimator": "k3", "gradient_accumulation_steps": 2, "num_iterations": 2},
    # 2
    "continued, not moved": {
        **{"beta": 0.1, "kl_estimator": "exact", "num_iterations": 2},
        **{"per_device_train_batch_size": 16, "dataloader_num_workers": 1},
    },
    # 3
    "full": {**SYNC, "kl_estimator": "exact", "steps_per_generation": 3, "prompt_repeats": 2},
    # 2
    "full, one update": {**SYNC, "kl_estimator": "exact", "supervision": "process"},
}


def vowels(completion_ids, **kwargs):
    return [float(sum(token % 5 == 0 for token in ids)) for ids in completion_ids]


def make(kind, tiny_model, folder, *, adapter=None, trainer_class=GRPOExtTrainer, callbacks=None, **config):
    """A trainer of one of the `SETTINGS`, changed by `config`; its four prompts are shuffled anew in every epoch."""
    model, peft_config = tiny_model, LoraConfig(**LORA) if kind == "lora" else None
    if kind.startswith("continued"):
        model = trained_adapter(tiny_model, CONTINUED["lora"], adapter)
    options = {
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "prompt_repeats": 1,
        **SETTINGS[kind],
        **config,
    }
    trainer_options = {"peft_config": peft_config, "callbacks": callbacks}
    return make_trainer(trainer_class, model, vowels, folder, trainer_options=trainer_options, **options)


def seen(trainer):
    """Weights of policy and reference, counters, and everything logged but times."""
    model = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    reference = {name: value.detach().clone() for name, value in trainer._reference_parameters().items()}
    log = [
        {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    return model, reference, trainer.state.global_step, log


def assert_same_run(found, expected):
    """Bit for bit."""
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert found[0] and found[3]
    assert found[2:] == expected[2:]


def steps_of(folder):
    """Steps of all folders that are named as checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def complete_steps(folder):
    manifests = {step: read_manifest(folder / f"checkpoint-{step}") for step in steps_of(folder)}
    return [step for step, manifest in manifests.items() if manifest is not None and manifest.complete]
