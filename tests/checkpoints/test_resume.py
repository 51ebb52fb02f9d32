"""A run that is resumed is the run that was not interrupted: weights, reference, prompts and everything logged."""

import math
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils.data import RandomSampler
from trl.trainer.utils import RepeatSampler

from tests.checkpoints.runs import SETTINGS, STEPS, assert_same_run, make, seen, vowels
from tests.support.adapters import LORA, trained_adapter
from tests.support.resume_worker import RecordingPrompts
from tests.support.training import PROMPTS, SetAttribute, make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.checkpoints.reference import REFERENCE_NAME
from trl_grpo_ext.checkpoints.trainer import skip_epochs


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_resumed_anywhere_is_the_run_that_was_not_interrupted(tiny_model, tmp_path, kind):
    trainer = make(kind, tiny_model, tmp_path / "whole", adapter=tmp_path / "adapter")
    trainer.train()
    assert trainer.state.epoch > (1 if kind == "lora" else 2)
    expected = seen(trainer)
    # A continued adapter is another one each time
    start = make(kind, tiny_model, tmp_path / "other", adapter=tmp_path / "adapter")
    assert any(not torch.equal(value, expected[1][name]) for name, value in seen(start)[1].items())
    for step in range(1, STEPS):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / str(step) / f"checkpoint-{step}")
        trainer = make(kind, tiny_model, tmp_path / str(step), adapter=tmp_path / "adapter", save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert_same_run(seen(trainer), expected)


def test_resumed_in_the_same_trainer_and_from_a_path_it_is_the_same_run(tiny_model, tmp_path):
    trainer = make("lora", tiny_model, tmp_path)
    trainer.train()
    expected = seen(trainer)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert_same_run(seen(trainer), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


ONE_UPDATE = {
    "beta": 0.0,
    "sync_ref_model": False,
    "kl_estimator": "k3",
    "supervision": "outcome",
    "num_iterations": 1,
}


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle_dataset": False}, {"ignore_data_skip": True}, {"num_iterations": 2}],
    ids=["shuffled", "in order", "ignore_data_skip", "two iterations"],
)
def test_prompts_of_later_epochs_come_in_the_order_of_the_uninterrupted_run(tiny_model, tmp_path, options):
    """Two batches make an epoch; TRL shuffles each epoch anew."""
    options = {**ONE_UPDATE, "steps_per_generation": 1, "max_steps": 8, "prompt_repeats": 1, **options}
    whole = make("full", tiny_model, tmp_path, trainer_class=RecordingPrompts, **options)
    whole.train()
    epochs = [whole.prompts[i] + whole.prompts[i + 1] for i in range(0, len(whole.prompts) - 1, 2)]
    assert (epochs[0] == epochs[1]) == ("shuffle_dataset" in options)
    for step in (2, 5):
        resumed = make("full", tiny_model, tmp_path, trainer_class=RecordingPrompts, **options, save_strategy="no")
        resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
        # A batch whose updates are not done is in the checkpoint
        first = math.ceil(step / whole.num_iterations)
        if "ignore_data_skip" in options:
            # From the epoch's beginning
            first -= first % 2
        expected = whole.prompts[first:]
        # A run that repeats a part of an epoch ends before the uninterrupted one does
        assert resumed.prompts == expected[: len(resumed.prompts)] and resumed.prompts
        assert "ignore_data_skip" in options or len(resumed.prompts) == len(expected)


def test_a_stream_has_no_sampler_and_resumes_as_in_transformers(tiny_model, tmp_path):
    def stream():
        yield from ({"prompt": prompt} for prompt in PROMPTS * 8)

    def trainer(folder):
        args = make("full", tiny_model, folder, **ONE_UPDATE, steps_per_generation=1, max_steps=3).args
        return RecordingPrompts(tiny_model, vowels, args, train_dataset=IterableDataset.from_generator(stream))

    whole = trainer(tmp_path)
    whole.train()
    assert whole._train_sampler is None
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.prompts == whole.prompts[2:]
    assert_same_run(seen(resumed), seen(whole))


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_new_sampler_continues_where_a_run_left_its_own(epochs):
    dataset = Dataset.from_dict({"prompt": list(range(10))})
    for sampler in (
        lambda: RepeatSampler(dataset, 2, 3, 2, seed=1),
        lambda: RepeatSampler(dataset, 2, 3, 2, shuffle=False),
        lambda: RandomSampler(dataset, generator=torch.Generator().manual_seed(1)),
        lambda: RepeatSampler(dataset, 2, 11),
    ):
        old, new = sampler(), sampler()
        for _ in range(epochs):
            list(old)
        skip_epochs(new, epochs)
        assert list(new) == list(old)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def test_the_reference_of_a_checkpoint_must_be_the_one_that_the_run_needs(run, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="holds a reference that had moved.*sync_ref_model=True"):
        make("lora", tiny_model, run, sync_ref_model=False).train(resume_from_checkpoint=True)
    make("lora", tiny_model, run, beta=0.0, sync_ref_model=False, kl_estimator="k3", max_steps=3).train(
        resume_from_checkpoint=True
    )
    still = {"sync_ref_model": False, "save_steps": 1}
    make("lora", tiny_model, tmp_path / "still", max_steps=1, **still).train()
    assert not (tmp_path / "still" / "checkpoint-1" / REFERENCE_NAME).exists()
    with pytest.raises(ValueError, match="checkpoint-1 does not hold it.*sync_ref_model=False"):
        make("lora", tiny_model, tmp_path / "still").train(resume_from_checkpoint=True)
    make("lora", tiny_model, tmp_path / "still", max_steps=2, **still).train(resume_from_checkpoint=True)


def test_a_reference_of_another_adapter_is_refused(run, tiny_model):
    adapter = {"peft_config": LoraConfig(**{**LORA, "target_modules": ["k_proj"]})}
    trainer = make_trainer(GRPOExtTrainer, tiny_model, vowels, run, trainer_options=adapter, **SETTINGS["lora"])
    trainer._resumed_from = run / "checkpoint-2"
    with pytest.raises(ValueError, match=r"another model: .*k_proj.*differ"):
        trainer._restore()


# ---------------------------------------------------------------------------------------------------------------------
# What a resumed run must not change, and what a callback may


@pytest.mark.parametrize("only_model", [False, True])
def test_a_frozen_part_of_the_adapter_stays_frozen_after_a_resume(tiny_model, tmp_path, only_model):
    def build(max_steps):
        model = trained_adapter(tiny_model, LoraConfig(**LORA), tmp_path / "adapter")
        for name, parameter in model.named_parameters():
            if "v_proj" in name:
                parameter.requires_grad_(False)
        return make_trainer(
            GRPOExtTrainer, model, vowels, tmp_path, beta=0.1, max_steps=max_steps, learning_rate=0.1,
            optim="adamw_torch", save_strategy="steps", save_steps=1, save_only_model=only_model,
        )  # fmt: skip

    first = build(2)
    first.train()
    frozen = {name: value for name, value in first.model.state_dict().items() if "v_proj" in name}
    trainer = build(3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad and "v_proj" in name] == []
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in frozen.items())


def test_scheduled_weights_resume_amid_the_updates_on_a_batch(tiny_model, tmp_path):
    def length(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    def run(folder, resume):
        schedule = SetAttribute("reward_weights", {step: torch.tensor([1.0, 0.2 * step]) for step in range(6)})
        trainer = make_trainer(
            GRPOExtTrainer, tiny_model, [vowels, length], folder, trainer_options={"callbacks": [schedule]},
            max_steps=5, learning_rate=0.1, optim="adamw_torch", num_iterations=2, save_strategy="steps",
            save_steps=1,
        )  # fmt: skip
        schedule.trainer = trainer
        trainer.train(resume)
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole", None)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_a_run_whose_beta_a_callback_sets_to_0_saves_the_reference_that_had_moved(tiny_model, tmp_path, estimator):
    schedule = SetAttribute("beta", {2: 0.0})
    trainer = make(
        "lora", tiny_model, tmp_path, callbacks=[schedule], max_steps=4, kl_estimator=estimator, num_iterations=1
    )
    schedule.trainer = trainer
    trainer.train()
    assert all((tmp_path / f"checkpoint-{step}" / REFERENCE_NAME).is_file() for step in (1, 4))
    schedule = SetAttribute("beta", {})
    trainer = make(
        "lora", tiny_model, tmp_path, callbacks=[schedule], max_steps=6, kl_estimator=estimator, num_iterations=1
    )
    schedule.trainer = trainer
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.log_history[-2]["kl"] > 0
