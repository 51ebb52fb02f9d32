"""The generated batch of a checkpoint is used again only if nothing that shaped it has changed."""

import dataclasses

import pytest
from trl import GRPOConfig

from tests.checkpoints.runs import assert_same_run, make, seen
from tests.support.resume_worker import RecordingPrompts
from trl_grpo_ext import GRPOExtConfig
from trl_grpo_ext.checkpoints.saved_batch import SavedBatch, batch_settings, changed_settings, load_batch, save_batch


# Another value of every field that shapes a batch
SHAPES = {
    "per_device_train_batch_size": 16,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 2,
    "prompt_separator": "=",
    "max_completion_length": 8,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"no_repeat_ngram_size": 2},
    "mask_truncated_completions": True,
    "reward_transforms": ["center"],
    "outcome_gate": ["none"],
    "supervision": "outcome",
    "advantage_estimator": "min",
    "position_baseline": "active",
    "gamma": 0.5,
    "gamma_unit": "step",
    "advantage_eps": 1e-6,
    "scale_rewards": "batch",
    "multi_objective_aggregation": "normalize_then_sum",
    "beta": 0.2,
    "kl_estimator": "k2",
}
# They act on a batch when its loss is computed, or on how its rewards are computed and not on what they are
SHAPE_NO_BATCH = {"kl_direction", "kl_reduction", "log_credit", "logits_memory_bytes", "reward_batch_tokens"}


def settings(sources=("vowels",), weights=(1.0,), processes=1, **options):
    config = GRPOExtConfig(use_cpu=True, bf16=False, **{"supervision": "process", "beta": 0.1, **options})
    return batch_settings(config, list(sources), list(weights), processes)


def test_every_field_of_this_package_shapes_a_batch_or_is_known_not_to():
    own = {field.name for field in dataclasses.fields(GRPOExtConfig)}
    own -= {field.name for field in dataclasses.fields(GRPOConfig)}
    assert own == (SHAPES.keys() & own) | SHAPE_NO_BATCH
    assert settings().keys() == SHAPES.keys() | {"processes", "reward_funcs", "reward_weights"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_changed_field_is_named(name):
    changes = changed_settings(settings(), settings(**{name: SHAPES[name]}))
    assert any(change.startswith(f"{name} was ") and str(SHAPES[name]) in change for change in changes)
    # Transformers derives one from another, and each estimator has options of its own
    assert len(changes) == 1 or name in ("num_generations", "advantage_estimator")


def test_changed_sources_weights_and_processes_are_named():
    changed = settings(sources=["vowels", "length"], weights=[1.0, 0.5], processes=2)
    assert changed_settings(settings(), settings()) == []
    assert changed_settings(settings(), changed) == [
        "processes was 1 and is 2",
        "reward_funcs was ['vowels'] and is ['vowels', 'length']",
        "reward_weights was [1.0] and is [1.0, 0.5]",
    ]


def test_a_setting_that_was_not_saved_is_a_change(tmp_path):
    old = settings()
    del old["gamma"]
    save_batch(tmp_path / "new" / "batch_0.pt", SavedBatch(old, [{"advantages": 1}]))
    saved = load_batch(tmp_path / "new" / "batch_0.pt")
    assert saved == SavedBatch(old, [{"advantages": 1}])
    assert changed_settings(saved.settings, settings()) == ["gamma was None and is 0.99"]
    assert load_batch(tmp_path / "batch_0.pt") is None


PROCESS = {"supervision": "process", "num_iterations": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.5}, "gamma was 0.99 and is 0.5."),
        ({"reward_weights": [0.5], "advantage_eps": 0.1}, r"reward_weights was [1.0] and is [0.5]; advantage_eps was"),
    ],
)
def test_a_batch_whose_advantages_would_differ_is_generated_anew(tiny_model, tmp_path, change, message, caplog):
    """Where the uninterrupted run would be: its next two updates are on this batch, the third on the next prompts."""
    make("lora", tiny_model, tmp_path, max_steps=1, **PROCESS).train()
    trainer = make("lora", tiny_model, tmp_path, max_steps=4, **PROCESS, **change)
    trainer.train(resume_from_checkpoint=True)
    (warning,) = [text for text in caplog.messages if "generated anew" in text]
    assert message in warning
    generated = [entry["step"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert generated == [1, 2, 4]


def test_a_batch_that_was_deleted_is_generated_anew(run, tiny_model, caplog):
    """And none of an earlier call of `train` is used instead."""
    trainer = make("lora", tiny_model, run, trainer_class=RecordingPrompts, max_steps=3, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.prompts == []
    (run / "checkpoint-2" / "batch_0.pt").unlink()
    trainer.train(resume_from_checkpoint=True)
    assert any("generated anew: the batch is not there for every process." in text for text in caplog.messages)
    assert len(trainer.prompts) == 1 and trainer.state.global_step == 3


def test_settings_that_shape_no_batch_leave_the_run_as_it_was(run, tiny_model, caplog):
    options = {"max_steps": 3, "save_strategy": "no"}
    first = make("lora", tiny_model, run, **options)
    first.train(resume_from_checkpoint=True)
    second = make("lora", tiny_model, run, **options, logits_memory_bytes=2**20, reward_batch_tokens=64)
    second.train(resume_from_checkpoint=True)
    assert not any("generated anew" in text for text in caplog.messages)
    assert_same_run(seen(second), seen(first))
