"""The exact KL that trains is the dense sum over the vocabulary of two copies of the model, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOTrainer

from tests.kl.dense import TEMPERATURE, dense_kl, dense_logps, mean_dense_kl
from tests.support.tiny_models import save_tiny_model
from tests.support.training import (
    FIRST_CHARACTER,
    Recorder,
    assert_same_gradients,
    fixed_completions,
    gradients,
    loss_and_gradients,
    make_trainer,
    moved_policy,
    scored_batch,
)
from trl_grpo_ext import GRPOExtTrainer


BETA = 0.5
LENGTHS = [3, 7, 5, 2, 6, 6, 1, 4]


def row_rewards(row, **kwargs):
    return [math.sin(5.0 * number) for number in row]


def same_rewards(row, **kwargs):
    return [1.0] * len(row)


# ---------------------------------------------------------------------------------------------------------------------
# Models and adapters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Architecture:
    model_class: type = LlamaForCausalLM
    config_class: type = LlamaConfig
    settings: dict[str, Any] = field(default_factory=dict)


MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "head_dim": 8,
}
GEMMA = {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
ARCHITECTURES = {
    "llama": Architecture(),
    "tied": Architecture(settings={"tie_word_embeddings": True}),
    "large_vocabulary": Architecture(settings={"vocab_size": 50_000}),
    "softcap": Architecture(Gemma2ForCausalLM, Gemma2Config, GEMMA),
    "logit_scale": Architecture(CohereForCausalLM, CohereConfig, {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "logits_scaling": Architecture(GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.5}),
    "head_bias": Architecture(PhiForCausalLM, PhiConfig),
    "moe": Architecture(Qwen3MoeForCausalLM, Qwen3MoeConfig, MOE | {"router_aux_loss_coef": 0.0}),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Callable[[str], str]:
    """Folder of an architecture by its name, saved at its first use."""
    folders: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in folders:
            made = ARCHITECTURES[name]
            path = tmp_path_factory.mktemp(name)
            folders[name] = save_tiny_model(path, made.model_class, made.config_class, **made.settings)
        if name == "head_bias":
            # Zero as initialised
            model = base_model(folders[name], torch.float32)
            model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(6))
            model.save_pretrained(folders[name])
        return folders[name]

    return folder


def lora_config(**options: Any) -> LoraConfig:
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **options)


def base_model(folder: str, dtype: torch.dtype) -> Any:
    # The default implementation of experts, a grouped matrix product, has no float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


@pytest.fixture(scope="module")
def saved_adapter(model_folder, tmp_path_factory) -> Callable[..., str]:
    """Folder of an adapter that is not zero, as after an earlier training."""

    def save(**options: Any) -> str:
        model = get_peft_model(base_model(model_folder("llama"), torch.float32), lora_config(**options))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        path = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(path)
        return str(path)

    return save


@dataclass
class Case:
    """What goes into the trainer, and a fresh copy of policy and reference in float64."""

    model: Any
    trainer_options: dict[str, Any]
    copy: Callable[[], Any]


HEAD = {"modules_to_save": ["lm_head"]}
ADAPTERS = {"fresh_lora": {}, "fresh_lora_and_head": HEAD, "trained_lora": {}, "trained_lora_and_head": HEAD}


@pytest.fixture
def case(request, model_folder, saved_adapter) -> Case:
    name = request.param
    if name not in ADAPTERS:
        folder = model_folder(name)
        return Case(folder, {}, lambda: base_model(folder, torch.float64))
    folder = model_folder("llama")
    options = ADAPTERS[name]
    if name.startswith("fresh"):
        return Case(
            folder,
            {"peft_config": lora_config(**options)},
            lambda: get_peft_model(base_model(folder, torch.float64), lora_config(**options)).double(),
        )
    adapter = saved_adapter(**options)
    return Case(
        PeftModel.from_pretrained(base_model(folder, torch.float32), adapter, is_trainable=True),
        {},
        lambda: PeftModel.from_pretrained(base_model(folder, torch.float64), adapter, is_trainable=True).double(),
    )


def at_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """`model` with the recorded weights; the frozen adapter "ref" that TRL adds is not part of a copy."""
    model.load_state_dict({name: value for name, value in weights.items() if ".ref." not in name})
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Value and gradient
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*ARCHITECTURES, *ADAPTERS], indirect=True)
def test_equals_the_dense_kl_in_value_and_gradient(case, tmp_path):
    """
    Four steps on two generated batches, each used twice. In the second one all completions get the same reward, so
    that the whole gradient is the KL's. Steps 2 and 4 are off policy: no ratio may multiply the KL.
    """
    rows = fixed_completions(LENGTHS)
    recorder = Recorder()

    def rewards(row, trainer_state, **kwargs):
        return row_rewards(row) if trainer_state.global_step < 2 else same_rewards(row)

    trainer = make_trainer(
        GRPOExtTrainer,
        case.model,
        rewards,
        tmp_path,
        trainer_options={"rollout_func": rows, "callbacks": [recorder], **case.trainer_options},
        kl_estimator="exact",
        loss_type="dapo",
        beta=BETA,
        temperature=TEMPERATURE,
        num_iterations=2,
        learning_rate=0.1,
        per_device_train_batch_size=8,
        max_steps=4,
        gradient_checkpointing="peft_config" in case.trainer_options,
    )
    trainer.train()

    logs = trainer.state.log_history
    assert logs[0]["kl"] < 1e-8
    assert abs(logs[0]["kl/k1"]) < 1e-6
    assert logs[1]["clip_ratio/region_mean"] > 0, "off policy"
    reference = at_weights(case.copy(), recorder.weights[0])
    for step in (1, 2, 3):
        policy = at_weights(case.copy(), recorder.weights[step])
        kl = mean_dense_kl(policy, reference, rows)
        assert kl > 1e-4
        assert logs[step]["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert logs[step]["kl_loss"] == pytest.approx(BETA * kl.item(), rel=1e-5)
        if step >= 2:
            assert logs[step]["loss"] == pytest.approx(BETA * kl.item(), rel=1e-5)
            (BETA * kl).backward()
            assert_same_gradients(recorder.gradients[step], gradients(policy), 1e-4)


def one_step(trainer_class, model, tmp_path, rows=None, reward=same_rewards, **config):
    """Log and gradient of one step that does not move the policy."""
    recorder = Recorder()
    settings = {"beta": BETA, "temperature": TEMPERATURE, "learning_rate": 0.0, "per_device_train_batch_size": 8}
    trainer = make_trainer(
        trainer_class,
        model,
        reward,
        tmp_path,
        trainer_options={"rollout_func": rows or fixed_completions(LENGTHS), "callbacks": [recorder]},
        max_steps=1,
        **(settings | config),
    )
    trainer.train()
    return trainer.state.log_history[0], recorder.gradients[0]


@pytest.mark.parametrize("supervised", [False, True], ids=["kl alone", "with rewards"])
def test_the_forward_kl_equals_the_dense_one_in_value_and_gradient(tiny_model, tmp_path, supervised):
    options = {"kl_estimator": "exact", "loss_type": "dapo", "reward": row_rewards if supervised else same_rewards}
    reverse_log, reverse_gradients = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, **options)
    log, found = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, kl_direction="forward", **options)
    policy = moved_policy(tiny_model).double()
    reference = base_model(tiny_model, torch.float64)
    rows = fixed_completions(LENGTHS)
    forward = mean_dense_kl(policy, reference, rows, "forward")
    reverse = mean_dense_kl(policy, reference, rows)
    assert log["kl"] == pytest.approx(forward.item(), rel=1e-5)
    assert log["kl_loss"] == pytest.approx(BETA * forward.item(), rel=1e-5)
    assert log["kl/second_pass_share"] == 0
    # The two directions differ by their KL terms only
    assert forward.item() != pytest.approx(reverse.item(), rel=1e-2)
    assert log["kl/k1"] == reverse_log["kl/k1"]
    assert log["policy_loss"] == reverse_log["policy_loss"]
    (BETA * (forward - reverse)).backward()
    difference = {name: found[name].double() - reverse_gradients[name].double() for name in found}
    assert_same_gradients(difference, gradients(policy), 1e-3)
    if not supervised:
        policy.zero_grad()
        (BETA * mean_dense_kl(policy, reference, rows, "forward")).backward()
        assert_same_gradients(found, gradients(policy), 1e-4)


def test_evaluation_logs_the_same_kl(tiny_model, tmp_path):
    """The mean over the micro-batches of an evaluation, which is not accumulated."""
    log, _ = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, kl_estimator="exact", loss_type="dapo")
    trainer = make_trainer(
        GRPOExtTrainer,
        moved_policy(tiny_model),
        same_rewards,
        tmp_path,
        trainer_options={
            "rollout_func": fixed_completions(LENGTHS),
            "eval_dataset": Dataset.from_dict({"prompt": ["ab", "cd"]}),
        },
        kl_estimator="exact",
        loss_type="dapo",
        beta=BETA,
        temperature=TEMPERATURE,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
    )
    found = trainer.evaluate()
    for name in ("kl", "kl_loss", "kl/k1", "kl/k3", "loss", "policy_loss"):
        assert found[f"eval_{name}"] == pytest.approx(log[name], rel=1e-5, abs=1e-7), name


def masked_mean_per_completion(kl_rows: list[torch.Tensor], masks: list[list[int]]) -> torch.Tensor:
    """`loss_type="grpo"`: the mean over completions of the mean over their loss tokens, 0 where there is none."""
    means = [(kl * torch.tensor(mask)).sum() / max(sum(mask), 1) for kl, mask in zip(kl_rows, masks, strict=True)]
    return torch.stack(means).mean()


def test_is_taken_over_the_loss_tokens_only(tiny_model, tmp_path):
    """One mask: tool output is context but no loss token, and a truncated completion is neither."""
    lengths = [6, 7, 5, 4, 6, 3, 7, 5]
    rows = fixed_completions(lengths, env_mask=[[1, 0, 0][:length] + [1] * (length - 3) for length in lengths])
    rows.completion_ids[2][-1] = FIRST_CHARACTER
    log, found = one_step(
        GRPOExtTrainer,
        moved_policy(tiny_model),
        tmp_path,
        rows,
        kl_estimator="exact",
        loss_type="grpo",
        mask_truncated_completions=True,
    )

    policy = moved_policy(tiny_model).double()
    reference = base_model(tiny_model, torch.float64)
    masks = rows.masks()
    masks[2] = [0] * lengths[2]
    kl_rows = [dense_kl(policy, reference, rows, row) for row in range(len(lengths))]
    kept = torch.cat([kl[torch.tensor(mask).bool()] for kl, mask in zip(kl_rows, masks, strict=True)])
    loss = BETA * masked_mean_per_completion(kl_rows, masks)
    assert log["kl"] == pytest.approx(kept.mean().item(), rel=1e-5)
    assert log["kl_loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert_same_gradients(found, gradients(policy), 1e-4)


def test_does_not_depend_on_sampling_options_or_on_the_ratio(tiny_model, tmp_path):
    base_log, base_gradients = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, kl_estimator="exact")
    for options in (
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence_token"},
        {"top_p": 0.5, "top_k": 3},
        {"use_bias_correction_kl": False},
    ):
        log, found = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, kl_estimator="exact", **options)
        assert (log["kl"], log["kl_loss"]) == (base_log["kl"], base_log["kl_loss"]), options
        assert_same_gradients(found, base_gradients, 1e-6)


def test_logs_the_estimates_of_the_same_tokens(tiny_model, tmp_path):
    """`kl/k1` and `kl/k3` are those of TRL's own log-probs, and all that TRL logs beside the KL is TRL's."""
    options = {"reward": row_rewards, "num_iterations": 2}
    trl_log, _ = one_step(GRPOTrainer, moved_policy(tiny_model), tmp_path, **options)
    log, _ = one_step(GRPOExtTrainer, moved_policy(tiny_model), tmp_path, kl_estimator="exact", **options)

    trainer = make_trainer(
        GRPOTrainer,
        moved_policy(tiny_model),
        row_rewards,
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(LENGTHS)},
        beta=BETA,
        temperature=TEMPERATURE,
        num_iterations=2,
        per_device_eval_batch_size=8,
    )
    batch = scored_batch(trainer, 8)
    log_ratios = (batch["old_per_token_logps"] - batch["ref_per_token_logps"])[batch["completion_mask"].bool()]
    assert log["kl/k1"] == pytest.approx(log_ratios.mean().item(), rel=1e-5)
    assert log["kl/k3"] == pytest.approx((torch.exp(-log_ratios) + log_ratios - 1).mean().item(), rel=1e-5)
    assert log["kl/k3"] == pytest.approx(trl_log["kl"], rel=1e-5)
    assert log["kl"] != pytest.approx(log["kl/k3"], rel=1e-2)
    for name in trl_log.keys() - {"kl", "loss", "grad_norm", "step_time"}:
        assert log[name] == pytest.approx(trl_log[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_runs_the_reference_once_per_generated_batch(tiny_model, tmp_path, lora):
    """
    Of 8 steps, 4 on each generated batch: 8 passes of the policy, 2 for its old log-probs, 2 of the reference. Before
    the first one, 2 passes of a few tokens compare the log-probs with the model's own.
    """
    options = {"peft_config": lora_config()} if lora else {}
    trainer = make_trainer(
        GRPOExtTrainer,
        tiny_model,
        row_rewards,
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(LENGTHS), **options},
        kl_estimator="exact",
        beta=BETA,
        num_iterations=4,
        per_device_train_batch_size=8,
        max_steps=8,
    )
    passes = {"policy": 0, "reference": 0}

    def count(name: str, model: Any) -> None:
        model.base_model.register_forward_pre_hook(lambda *_: passes.update({name: passes[name] + 1}))

    count("policy", trainer.model.get_base_model() if lora else trainer.model)
    if not lora:
        count("reference", trainer.ref_model)
    trainer.train()
    own = 8 + 2 + 2
    assert passes == ({"policy": own + 2, "reference": 0} if lora else {"policy": own, "reference": 2})


def test_mixture_of_experts_keeps_trls_auxiliary_loss(tmp_path):
    settings = MOE | {"router_aux_loss_coef": 0.1}
    folder = save_tiny_model(tmp_path / "moe", Qwen3MoeForCausalLM, Qwen3MoeConfig, **settings)
    trl_log, trl_gradients = one_step(GRPOTrainer, folder, tmp_path, reward=row_rewards)
    log, found = one_step(GRPOExtTrainer, folder, tmp_path, reward=row_rewards, kl_estimator="exact")
    assert trl_log["aux_loss"] > 0.1
    assert log["aux_loss"] == pytest.approx(trl_log["aux_loss"], rel=1e-6)
    assert log["loss"] == pytest.approx(trl_log["loss"], rel=1e-5)
    assert log["loss"] == pytest.approx(log["policy_loss"] + log["kl_loss"] + 0.1 * log["aux_loss"], rel=1e-5)
    # Policy and reference are the same: neither KL has a gradient, all of it is the policy's and the routers'
    assert_same_gradients(found, trl_gradients, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Off policy: the sampled estimates, and the sequence's ratio with the token's gradient
# ---------------------------------------------------------------------------------------------------------------------


def off_policy_trainer(trainer_class, model, tmp_path, **config):
    """A trainer, and a batch whose tokens are more or less likely than when they were sampled, by up to a half."""
    trainer = make_trainer(
        trainer_class,
        model,
        row_rewards,
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(LENGTHS)},
        num_iterations=2,
        per_device_eval_batch_size=8,
        **config,
    )
    batch = scored_batch(trainer, 8)
    generator = torch.Generator().manual_seed(4)
    old_logps = batch["old_per_token_logps"]
    old_logps += 0.2 * torch.randn(old_logps.shape, generator=generator)
    old_logps += 0.4 * (torch.rand(8, 1, generator=generator) - 0.5)
    return trainer, batch


@pytest.mark.parametrize(
    ("estimator", "correction", "level"),
    [("k1", True, "token"), ("k2", True, "token"), ("k2", False, "token"), ("k1", True, "sequence")],
)
def test_estimates_take_the_ratio_off_policy(tiny_model, tmp_path, estimator, correction, level):
    """`ratio * k1` differentiates the ratio, `sg[ratio] * k2` does not: both then have the KL's expected gradient."""
    settings = {"kl_estimator": estimator, "use_bias_correction_kl": correction, "importance_sampling_level": level}
    trainer, batch = off_policy_trainer(
        GRPOExtTrainer, moved_policy(tiny_model), tmp_path, beta=BETA, loss_type="dapo", **settings
    )
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    loss, found = loss_and_gradients(trainer, batch)

    rows = fixed_completions(LENGTHS)
    policy = moved_policy(tiny_model).double()
    values = []
    for row, ids in enumerate(rows.completion_ids):
        logp = dense_logps(policy, rows, row, 1.0)
        log_ratio = logp - batch["old_per_token_logps"][row, : len(ids)].double()
        ratio = torch.exp(log_ratio.mean() if level == "sequence" else log_ratio)
        log_p_q = logp - batch["ref_per_token_logps"][row, : len(ids)].double()
        value = ratio * log_p_q if estimator == "k1" else log_p_q**2 / 2
        values.append(value * ratio.detach() if estimator == "k2" and correction else value)
    expected = BETA * torch.cat(values).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, gradients(policy), 1e-4)


def test_sequence_token_reduces_to_sequence_in_value(tiny_model, tmp_path):
    """Under advantages that are constant in a completion, GSPO-token's loss is GSPO's."""

    def loss_at(trainer_class, level):
        settings = {"importance_sampling_level": level, "loss_type": "grpo"}
        return loss_and_gradients(*off_policy_trainer(trainer_class, tiny_model, tmp_path, **settings))[0]

    loss = loss_at(GRPOExtTrainer, "sequence_token")
    trl_loss = loss_at(GRPOTrainer, "sequence")
    token_loss = loss_at(GRPOTrainer, "token")
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert loss != pytest.approx(token_loss, rel=1e-2)


def test_sequence_token_has_the_gradient_of_each_token(tiny_model, tmp_path):
    """`s_t = sg[s] p_t / sg[p_t]` with `s = exp(mean_t log(p_t / p_old,t))` (arXiv 2507.18071, eq. 14)."""
    settings = {"importance_sampling_level": "sequence_token", "loss_type": "grpo"}
    trainer, batch = off_policy_trainer(GRPOExtTrainer, tiny_model, tmp_path, **settings)
    generator = torch.Generator().manual_seed(5)
    batch["advantages"] = torch.randn(batch["old_per_token_logps"].shape, generator=generator)
    loss, found = loss_and_gradients(trainer, batch)

    rows = fixed_completions(LENGTHS)
    policy = base_model(tiny_model, torch.float64)
    losses = []
    clipped = 0
    for row, ids in enumerate(rows.completion_ids):
        logp = dense_logps(policy, rows, row, trainer.args.temperature)
        log_ratio = logp.detach() - batch["old_per_token_logps"][row, : len(ids)].double()
        ratio = log_ratio.mean().exp() * torch.exp(logp - logp.detach())
        advantage = batch["advantages"][row, : len(ids)].double()
        losses.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())
        clipped += bool((ratio != ratio.clamp(0.8, 1.2)).any())
    expected = torch.stack(losses).mean()
    expected.backward()
    assert 0 < clipped < 8
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, gradients(policy), 1e-4)
