"""The KL's reference is the model before training, whatever PEFT does; where it cannot be, construction fails."""

import gc
import logging
import weakref

import pytest
import torch
from peft import AdaLoraConfig, FourierFTConfig, LoraConfig, PeftModel, get_peft_model
from trl import GRPOTrainer

from tests.support.adapters import CONTINUED, LORA, answer_length, base, trained_adapter
from tests.support.training import make_trainer, moved_policy
from trl_grpo_ext import GRPOExtTrainer, StepRewards


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("name", CONTINUED)
def test_kl_of_a_continued_adapter_starts_at_zero(tiny_model, tmp_path, name, estimator):
    model = trained_adapter(tiny_model, CONTINUED[name], tmp_path / "adapter")
    options = {"beta": 0.1, "kl_estimator": estimator, "max_steps": 2, "learning_rate": 0.1}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trainer.train()
    before, after = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert abs(before) < 1e-8
    assert after > 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weights"),
        ({"bias": "lora_only"}, "bias='lora_only' in the PEFT config trains the base"),
        ({"bias": "all"}, "bias='all' in the PEFT config trains the base"),
    ],
)
def test_adapters_that_change_the_base_are_refused(tiny_model, tmp_path, options, message):
    def make(beta):
        adapter = {"peft_config": LoraConfig(**{**LORA, **options})}
        return make_trainer(GRPOExtTrainer, tiny_model, answer_length, tmp_path, trainer_options=adapter, beta=beta)

    with pytest.raises(ValueError, match=message):
        make(0.1)
    make(0.0)


def test_the_reference_is_freed_with_the_trainer(tiny_model, tmp_path):
    model = base(tiny_model)
    model.name_or_path = tiny_model
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 1}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trainer.train()
    head = weakref.ref(trainer.ref_model.lm_head.weight)
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    assert head() is None
    # The model stays usable
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape[1] == 3


def test_rewards_on_tokens_that_are_not_trained_on_count_as_unjudged(tiny_model, tmp_path):
    def judge_last(completion_ids, **kwargs):
        return [StepRewards([len(ids) - 1], [1.0]) for ids in completion_ids]

    # Two tokens are never enough to end, so that every completion is truncated and masked
    options = {
        "supervision": "process",
        "mask_truncated_completions": True,
        "max_completion_length": 2,
        "max_steps": 1,
    }
    trainer = make_trainer(GRPOExtTrainer, tiny_model, judge_last, tmp_path, min_p=0.5, **options)
    trainer.train()
    masked = trainer.state.log_history[0]["completions/clipped_ratio"]
    assert masked > 0
    assert trainer.state.log_history[0]["rewards/judge_last/unjudged"] == pytest.approx(masked)


# ---------------------------------------------------------------------------------------------------------------------
# What trains, and where the policy starts


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_a_frozen_part_of_the_adapter_stays_frozen(tiny_model, tmp_path, estimator):
    model = trained_adapter(tiny_model, CONTINUED["lora"], tmp_path / "adapter")
    frozen = [name for name, _ in model.named_parameters() if "layers.0" in name and "lora" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).clone() for name in frozen}
    options = {"beta": 0.1, "kl_estimator": estimator, "max_steps": 3, "learning_rate": 0.1}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and not trains & set(frozen) and not [name for name in trains if ".ref" in name]
    trainer.train()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert trainer.state.log_history[2]["kl"] > 1e-8


@pytest.mark.parametrize("config", [{"beta": 0.0}, {}, {"kl_estimator": "k2"}, {"kl_estimator": "exact"}], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_does_not_train_is_refused(tiny_model, tmp_path, config, merged):
    trained = trained_adapter(tiny_model, CONTINUED["lora"], tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(base(tiny_model), tmp_path / "adapter")
    model = trained.merge_and_unload() if merged else frozen
    with pytest.raises(ValueError, match=r"no trainable parameter.*is_trainable=True.*merge_and_unload\(\)"):
        make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **({"beta": 0.1} | config))


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_an_adapter_of_any_name_is_continued_and_a_second_stage_starts_at_zero(tiny_model, tmp_path, estimator):
    base_model = get_peft_model(base(tiny_model), LoraConfig(**LORA), adapter_name="maths")
    generator = torch.Generator().manual_seed(3)
    for parameter in base_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    options = {"beta": 0.1, "kl_estimator": estimator, "max_steps": 2, "learning_rate": 0.1}
    for stage in ("first", "second"):
        trainer = make_trainer(GRPOExtTrainer, base_model, answer_length, tmp_path / stage, **options)
        trainer.train()
        before, after = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
        assert abs(before) < 1e-8 < after


def test_a_continued_adapter_trains_as_with_trl(tiny_model, tmp_path):
    def weights(trainer_class):
        folder = tmp_path / trainer_class.__name__
        torch.manual_seed(0)
        model = trained_adapter(tiny_model, CONTINUED["lora"], folder / "adapter")
        options = {"beta": 0.1, "max_steps": 3, "learning_rate": 0.1}
        trainer = make_trainer(trainer_class, model, answer_length, folder, **options)
        trainer.train()
        return model.state_dict(), trainer.state.log_history

    ours, our_log = weights(GRPOExtTrainer)
    theirs, their_log = weights(GRPOTrainer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for entry, other in zip(our_log, their_log, strict=True):
        assert all(
            entry[name] == value for name, value in other.items() if "time" not in name and "per_second" not in name
        )


def test_a_policy_that_is_not_its_reference_is_an_error_or_said_once(tiny_model, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    options = {"beta": 0.1, "max_steps": 2}

    def train(model, name, **more):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make_trainer(GRPOExtTrainer, model, answer_length, tmp_path / name, **options, **more).train()
        return [r.getMessage() for r in caplog.records if "Before the first update" in r.getMessage()]

    assert train(tiny_model, "path", kl_estimator="exact") == []
    (message,) = train(moved_policy(tiny_model), "moved", kl_estimator="exact")
    assert "is loaded anew from" in message
    merged = trained_adapter(tiny_model, CONTINUED["lora"], tmp_path / "trained").merge_and_unload()
    merged.requires_grad_(True)
    (message,) = train(merged, "merged", kl_estimator="exact")
    assert "an adapter that was merged in memory" in message
    not_zero = [
        LoraConfig(**LORA, init_lora_weights=False),
        FourierFTConfig(n_frequency=100, scaling=150.0, target_modules=["q_proj"]),
    ]
    for adapter in not_zero:
        for estimator in ("k3", "exact"):
            with pytest.raises(ValueError, match="the adapter does not start at zero"):
                new = {"trainer_options": {"peft_config": adapter}, "kl_estimator": estimator}
                train(tiny_model, f"{adapter.peft_type} {estimator}", **new)
    with_dropout = base(tiny_model)
    with_dropout.config.attention_dropout = 0.5
    for layer in with_dropout.model.layers:
        layer.self_attn.attention_dropout = 0.5
    (message,) = train(with_dropout, "dropout")
    assert "attention_dropout=0.5" in message


# ---------------------------------------------------------------------------------------------------------------------
# The adapter "ref": whose it is, and what it is a copy of


def kls(trainer):
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


def adapters(folder, **configs):
    """A model with adapters of these names, the last one active."""
    model = base(folder)
    for name, config in configs.items():
        model = model if isinstance(model, PeftModel) else get_peft_model(model, config, adapter_name=name)
        if name not in model.peft_config:
            model.add_adapter(name, config)
        model.set_adapter(name)
    return model


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ref"], "the adapter that is trained is called 'ref', .* Load it under another name"),
        (["ref", "default"], "an adapter called 'ref' that this package has not made"),
    ],
)
def test_an_adapter_of_the_users_is_never_the_reference(tiny_model, tmp_path, names, message, estimator):
    model = adapters(tiny_model, **{name: LoraConfig(**LORA) for name in names})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, beta=0.1, kl_estimator=estimator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, beta=0.0)


SECOND = {
    "larger scale": {"lora_alpha": 64},
    "other rank": {"r": 2},
    "other layers": {"target_modules": ["down_proj"]},
    "fewer layers": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("changed", SECOND.values(), ids=SECOND)
def test_the_reference_of_a_second_stage_is_a_copy_of_its_own_adapter(tiny_model, tmp_path, changed):
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 5, "learning_rate": 0.5}
    model = adapters(tiny_model, first=LoraConfig(**LORA))
    make_trainer(GRPOExtTrainer, model, answer_length, tmp_path / "first", **options).train()
    model.add_adapter("second", LoraConfig(**{**LORA, **changed}))
    model.set_adapter("second")
    moves = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path / "second", **options, **moves)
    assert model.active_adapters == ["second"]
    trainer.train()
    found = kls(trainer)
    # The reference is the policy at the start, and again after each copy
    assert [abs(found[step]) < 1e-8 for step in (0, 2, 4)] == [True] * 3
    assert min(found[1], found[3]) > 1e-8


@pytest.mark.parametrize("name", ["model", "1", "mlp"])
def test_an_adapter_may_have_the_name_of_a_module(tiny_model, tmp_path, name):
    model = adapters(tiny_model, **{name: LoraConfig(**LORA)})
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 2, "learning_rate": 0.5}
    trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, **options)
    trainer.train()
    before, after = kls(trainer)
    assert abs(before) < 1e-8 < after


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_a_weight_that_trains_outside_the_adapter_is_refused(tiny_model, tmp_path, estimator):
    model = adapters(tiny_model, default=LoraConfig(**LORA))
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(ValueError, match="'base_model.model.model.norm.weight' trains and belongs to no adapter"):
        make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, beta=0.1, kl_estimator=estimator)
    make_trainer(GRPOExtTrainer, model, answer_length, tmp_path, beta=0.0)


def test_a_given_adalora_is_refused_with_the_way_out(tiny_model, tmp_path):
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="ADALORA allows one adapter that trains.*peft_config=AdaLoraConfig"):
        make_trainer(GRPOExtTrainer, adapters(tiny_model, default=config), answer_length, tmp_path, beta=0.1)
    make_trainer(
        GRPOExtTrainer, tiny_model, answer_length, tmp_path, trainer_options={"peft_config": config}, beta=0.1
    )


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_noise_on_the_embeddings_is_named_and_trained_with(tiny_model, tmp_path, caplog, adapter, estimator):
    logging.getLogger("transformers").propagate = True
    options = {"beta": 0.1, "kl_estimator": estimator, "max_steps": 1, "neftune_noise_alpha": 5.0}
    trainer_options = {"peft_config": adapter}
    with caplog.at_level(logging.WARNING):
        make_trainer(
            GRPOExtTrainer, tiny_model, answer_length, tmp_path, trainer_options=trainer_options, **options
        ).train()
    (message,) = [text for text in caplog.messages if "Before the first update" in text]
    assert "neftune_noise_alpha=5.0" in message


def test_the_start_is_looked_at_in_the_first_batch_with_loss_tokens(tiny_model, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    masks = iter([True, False, False])

    class FirstMasked(GRPOExtTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            if next(masks):
                output["completion_mask"] = torch.zeros_like(output["completion_mask"])
            return output

    options = {"beta": 0.1, "kl_estimator": "k3", "max_steps": 3}
    with caplog.at_level(logging.WARNING):
        make_trainer(FirstMasked, moved_policy(tiny_model), answer_length, tmp_path, **options).train()
    assert len([text for text in caplog.messages if "Before the first update" in text]) == 1


def test_two_trainers_of_one_model_have_a_reference_and_a_divergence_each(tiny_model, tmp_path):
    options = {"beta": 0.1, "kl_estimator": "exact", "max_steps": 3, "learning_rate": 0.1}

    def train(with_another):
        model = base(tiny_model)
        torch.manual_seed(0)
        trainer = make_trainer(GRPOExtTrainer, model, answer_length, tmp_path / "one", **options)
        if with_another:
            make_trainer(GRPOExtTrainer, model, answer_length, tmp_path / "two", kl_direction="forward", **options)
            gc.collect()
        trainer.train()
        return kls(trainer)

    alone = train(with_another=False)
    assert alone[2] > 1e-4 and train(with_another=True) == alone
