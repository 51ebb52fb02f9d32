"""The trainer: TRL's, with our advantages in the batch and our KL in the loss."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from ._swapped import swapped
from ._trl import ADVANTAGE_EPS, GRPOTrainer, SyncRefModelCallback, get_config_model_id
from .advantages.combine import process_advantages
from .checkpoints.trainer import CheckpointedTrainer
from .config import GRPOExtConfig
from .distributed import gather, gather_tokens, local_rows, total
from .kl.cached_reference import CachedReference, OnSync
from .kl.estimates import kl_estimate, weight_by_ratio
from .kl.model_forward import ModelCall
from .kl.reference import adapter_reference, move_adapter_reference, prepare_adapter_reference
from .loss import (
    CLIPPED_LOSSES,
    ExpectedLoss,
    importance_ratio,
    reduce_tokens,
    sequence_token_old_logps,
    token_weights,
)
from .metrics import (
    completion_means,
    outcome_correlations,
    positive_counts,
    step_metrics,
    unjudged_shares,
    unscored_shares,
    withheld_shares,
)
from .reward_models.opening import open_reward_models
from .rewards.gating import NO_GATE, gate_indices, withheld_rewards
from .rewards.sources import RewardSource, read_model_rewards, wrap_source
from .rewards.types import place_rewards


class GRPOExtTrainer(CheckpointedTrainer):
    """
    [`~trl.GRPOTrainer`] with process supervision, several weighted reward sources at token level and an exact KL.

    Takes the same arguments; `args` is a [`GRPOExtConfig`]. With its new fields at their defaults, training is TRL's.
    A reward function may return, for each completion, a float, a list of floats as long as `completion_ids`,
    [`StepRewards`], or `None`.

    Example:

    ```python
    >>> from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, StepRewards

    >>> def judge_steps(completion_ids, **kwargs):  # one step per newline token, all of them right
    ...     ends = [[t for t, token in enumerate(ids) if token == 198] for ids in completion_ids]
    ...     return [StepRewards(ends=e, values=[1.0] * len(e)) for e in ends]

    >>> trainer = GRPOExtTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=[judge_steps],
    ...     args=GRPOExtConfig(supervision="process", beta=0.01, kl_estimator="exact"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Raises:
        TypeError: `args` is not a [`GRPOExtConfig`].
        ValueError: a number of weights, gammas or transforms that differs from the number of reward sources, or a
            combination that is not supported, with the reason.
    """

    _tag_names = [*GRPOTrainer._tag_names, "trl-grpo-ext"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOExtConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOExtConfig(f"{model_name.split('/')[-1]}-GRPO")
        if not isinstance(args, GRPOExtConfig):
            raise TypeError(
                f"args must be a GRPOExtConfig, not {type(args).__name__}; the fields of GRPOConfig carry over."
            )
        if reward_funcs is not None:
            init_kwargs = cast(dict[str, Any], args.model_init_kwargs or {})
            loading = {"trust_remote_code": args.trust_remote_code, **init_kwargs}
            sources = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = open_reward_models(sources, loading)
        # TRL refuses to move a reference under PEFT
        with swapped(args, sync_ref_model=False):
            super().__init__(model, reward_funcs, args, *positional, **keywords)
        args.check_sources(self.reward_func_names)
        self._separator_ids = self._tokenize_separator()
        self._transforms = args.reward_transforms or ["none"] * len(self.reward_funcs)
        self._gates = gate_indices(args.outcome_gate or [NO_GATE] * len(self.reward_funcs), self.reward_func_names)
        # A list of our own: the user's keeps the user's functions
        self.reward_funcs = [
            wrap_source(*source, args.reward_batch_tokens, self.accelerator, self._tokenizer)
            for source in zip(self.reward_funcs, self.reward_func_names, self._transforms, strict=True)
        ]
        self._sequence_token = args.importance_sampling_level == "sequence_token"
        if self._sequence_token:
            # TRL's loss is the token-level one; the ratio's value comes in through the old log-probs
            self.importance_sampling_level = "token"
        self._reference = self._prepare_reference()
        # Of the batch that is being scored
        self._rewards_per_func = self._withheld = torch.empty(0)
        self._gives_steps: list[bool] = []

    def _prepare_reference(self) -> CachedReference | None:
        """See to it that the reference is right, and moves if it is to; the exact KL caches its states."""
        moves = self.args.sync_ref_model
        if moves and self.is_fsdp_enabled and cast(Any, self.accelerator.state.fsdp_plugin).fsdp_version == 1:
            raise ValueError("sync_ref_model does not know the flat parameters of FSDP1. Use fsdp_version: 2.")
        if self.beta != 0.0 and isinstance(self.model, PeftModel):
            prepare_adapter_reference(self.model, moves)
        cached = None
        if self.args.kl_estimator == "exact":
            cached = CachedReference(
                cast(nn.Module, self.model), self.ref_model, self.accelerator, logits_memory=self.args.logits_memory
            )
        if moves and self.ref_model is not None:
            self.add_callback(SyncRefModelCallback(cast(nn.Module, self.ref_model), self.accelerator))
        if moves:
            self.add_callback(OnSync(self._on_sync))
        return cached

    def _on_sync(self) -> None:
        """Move the reference, unless TRL's callback has; states that are kept of the one before are worth nothing."""
        if self.ref_model is None:
            move_adapter_reference(self._unwrapped(self.model), self.args.ref_model_mixup_alpha)
        for batch in self._buffered_inputs or []:
            batch.pop("ref_hidden_states", None)

    def _unwrapped(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)

    def _reference_parameters(self) -> dict[str, torch.Tensor]:
        model = self._unwrapped(self.model)
        if self.beta != 0.0 and isinstance(model, PeftModel):
            return adapter_reference(model)
        return dict(self._unwrapped(self.ref_model).named_parameters()) if self.args.sync_ref_model else {}

    def _tokenize_separator(self) -> list[int]:
        separator = self.args.prompt_separator
        if separator is None:
            return []
        if self._is_vlm or self.rollout_func is not None:
            culprit = "a vision-language model" if self._is_vlm else "rollout_func"
            raise ValueError(
                f"prompt_separator does not work with {culprit}, which tokenizes prompts by itself; write the "
                "separator into the prompts instead."
            )
        ids = self._tokenizer(separator, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_separator {separator!r} has no tokens in this tokenizer.")
        return ids

    def _tokenize_prompts(self, prompts: list) -> tuple[list, Any, dict]:
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        return [[*ids, *self._separator_ids] for ids in prompt_ids], images, multimodal_fields

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for k, (source, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if isinstance(source, nn.Module):
                rewards_per_func[:, k] = read_model_rewards(rewards_per_func[:, k], name, self._transforms[k])
        self._rewards_per_func = rewards_per_func
        self._withheld = withheld_rewards(rewards_per_func, self._gates)
        self._log_withheld_and_unscored()
        return rewards_per_func.masked_fill(self._withheld, torch.nan)

    def _log_withheld_and_unscored(self) -> None:
        if self.args.outcome_gate:
            self._record(withheld_shares(self.reward_func_names, self._rewards_per_func, self._withheld))
        counts = [s.count_steps() if isinstance(s, RewardSource) else (0, 0) for s in self.reward_funcs]
        summed = total(self.accelerator, torch.tensor(counts, dtype=torch.float, device=self.accelerator.device))
        self._record(unscored_shares(self.reward_func_names, summed))
        self._gives_steps = [steps > 0 for _, steps in summed]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._reference is not None and not torch.is_grad_enabled() and self._reference.is_reference(model):
            model = self._reference.recorded(model, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._reference is not None:
            output["ref_hidden_states"] = self._reference.take()
            # The reference ran without its head, so these are NaN
            del output["ref_per_token_logps"]
        mask_BT = _loss_mask(output)
        if self.args.supervision == "process":
            output["advantages"] = self._process_advantages(mask_BT)
        else:
            self._record(unjudged_shares(self.reward_func_names, self._rewards_per_func.isnan()))
            if self.args.advantage_eps != ADVANTAGE_EPS:
                output["advantages"] = self._outcome_advantages()
        self._log_advantages(output["advantages"], mask_BT)
        return output

    @property
    def _mode(self) -> str:
        """Where TRL's metrics of this moment go."""
        assert self.model is not None
        return "train" if self.model.training else "eval"

    @property
    def _group_size(self) -> int:
        return cast(int, self.num_generations if self._mode == "train" else self.num_generations_eval)

    def _group_advantages(self, rewards_KNT: torch.Tensor, mask_NT: torch.Tensor, **options: Any) -> torch.Tensor:
        """This process's rows of the advantages of all processes' completions."""
        advantages_NT = process_advantages(
            # Apple's GPUs have no float64
            rewards_KNT.to(torch.float32 if rewards_KNT.device.type == "mps" else torch.float64),
            mask_NT,
            self.reward_weights.to(rewards_KNT.device),
            self._group_size,
            aggregation=self.multi_objective_aggregation,
            scale=self.scale_rewards,
            eps=self.args.advantage_eps,
            **options,
        )
        return local_rows(self.accelerator, advantages_NT).float()

    def _outcome_advantages(self) -> torch.Tensor:
        """TRL's scalar advantages with another epsilon: completions of one token."""
        rewards_KN1 = self._rewards_per_func.masked_fill(self._withheld, torch.nan).T.unsqueeze(-1)
        mask_N1 = torch.ones_like(rewards_KN1[0], dtype=torch.bool)
        return self._group_advantages(rewards_KN1, mask_N1, estimator="position", gamma=1.0).squeeze(-1)

    def _process_advantages(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """Advantages `(B, T)` of this process, normalised over the groups of all processes."""
        scores_KB = local_rows(self.accelerator, self._rewards_per_func).T.tolist()
        rewards_BKT = torch.stack(
            [
                place_rewards(source.rewards if isinstance(source, RewardSource) else scores, mask_BT)
                for source, scores in zip(self.reward_funcs, scores_KB, strict=True)
            ],
            dim=1,
        )
        mask_NT = gather_tokens(self.accelerator, mask_BT.long(), 0).bool()
        rewards_KNT = gather_tokens(self.accelerator, rewards_BKT, torch.nan).transpose(0, 1).where(mask_NT, torch.nan)
        self._record(step_metrics(self.reward_func_names, rewards_KNT, mask_NT))
        self._record(outcome_correlations(self.reward_func_names, rewards_KNT, self._gives_steps, self._group_size))
        self._record(unjudged_shares(self.reward_func_names, rewards_KNT.isnan().all(-1).T))
        return self._group_advantages(
            rewards_KNT.masked_fill(self._withheld.T.unsqueeze(-1), torch.nan),
            mask_NT,
            estimator=self.args.process_advantage,
            gamma=cast(float | list[float], self.args.gamma),
            gamma_unit=self.args.gamma_unit,
            options={"position_baseline": self.args.position_baseline},
        )[:, : mask_BT.size(1)]

    def _log_advantages(self, advantages: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Log the advantages that are trained on; in the completions table, each completion's mean."""
        means = gather(self.accelerator, completion_means(advantages, mask_BT)).tolist()
        logged = self._logs["advantages"]
        for _ in range(min(len(means), len(logged))):
            logged.pop()
        logged.extend(means)
        positive, counted = total(self.accelerator, positive_counts(advantages, mask_BT))
        self._record([("advantages/positive_share", positive / max(counted, 1.0))])

    def _record(self, metrics: Iterable[tuple[str, float]]) -> None:
        for name, value in metrics:
            self._metrics[self._mode][name].append(value)

    def _compute_loss(self, model, inputs):
        inputs = dict(inputs)
        outputs: list[Any] = []

        def on_output(output: Any) -> None:
            outputs.append(output)
            if self._sequence_token:
                self._set_sequence_ratio(output, inputs)

        extra = {}
        if self._reference is not None:
            extra["expected_loss"] = self._expected_loss(inputs)
            if "ref_hidden_states" in inputs:
                extra["ref_hidden_states"] = inputs.pop("ref_hidden_states")
            else:
                model = self._reference.rerunning(model, inputs["completion_ids"].size(1))
        # With `beta` at 0, TRL's loss has neither its KL term nor its KL metric
        with swapped(self, beta=self.beta if self.args.uses_trl_kl else 0.0):
            loss = super()._compute_loss(ModelCall(model, on_output, **extra), inputs)
        return self._add_kl(loss, outputs[0], inputs)

    def _set_sequence_ratio(self, output: Any, inputs: dict[str, Any]) -> None:
        # Without old log-probs every ratio is 1
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = sequence_token_old_logps(
                _completion_logps(output, inputs), inputs["old_per_token_logps"], _loss_mask(inputs)
            )

    def _add_kl(self, loss: torch.Tensor, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Add our KL term to TRL's loss, unless that holds its own, and log both parts."""
        steps = self._accumulation_steps
        policy_loss = loss.detach()
        if self.aux_loss_enabled:
            policy_loss = policy_loss - self.router_aux_loss_coef * output.aux_loss.detach() / steps
        if self.beta == 0.0:
            self._log_loss(policy_loss * steps, None, {}, _loss_mask(inputs))
            return loss
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.args.uses_trl_kl):
            kls = self._kls(output, inputs)
            options = self._reduction_options(inputs)
            kl_loss = self.beta * reduce_tokens(kls["kl"], _loss_mask(inputs), self._kl_reduction, **options)
        if self.args.uses_trl_kl:
            policy_loss, kls = policy_loss - kl_loss, {}
        else:
            loss = loss + kl_loss
        self._log_loss(policy_loss * steps, kl_loss.detach() * steps, kls, _loss_mask(inputs))
        return loss

    def _kls(self, output: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Per-token KL `(B, T)` as it enters the loss, and beside an exact one the estimates from the same tokens."""
        estimator, logp_BT = self.args.kl_estimator, _completion_logps(output, inputs)
        if estimator == "exact":
            estimates = {f"kl/{k}": kl_estimate(logp_BT.detach(), output.ref_log_probs, k) for k in ("k1", "k3")}
            return {"kl": output.kl, **estimates}
        kl_BT = kl_estimate(logp_BT, inputs["ref_per_token_logps"], estimator)
        if self.args.use_bias_correction_kl:
            old_logp_BT = inputs.get("old_per_token_logps", logp_BT.detach())
            ratio = importance_ratio(logp_BT, old_logp_BT, _loss_mask(inputs), self.importance_sampling_level)
            kl_BT = weight_by_ratio(kl_BT, ratio, estimator)
        return {"kl": kl_BT}

    def _expected_loss(self, inputs: dict[str, Any]) -> ExpectedLoss | None:
        """What the exact KL's head may expect of TRL's loss; `None` where its gradient is not a token's own."""
        old_logp_BT = inputs.get("old_per_token_logps")
        clips = self.loss_type in CLIPPED_LOSSES and self.args.importance_sampling_level == "token"
        if old_logp_BT is not None and not clips:
            return None
        mask_BT, options = _loss_mask(inputs), self._reduction_options(inputs)
        advantages = inputs["advantages"] if inputs["advantages"].ndim == 2 else inputs["advantages"].unsqueeze(1)
        policy_weights_BT = token_weights(mask_BT, self.loss_type, **options)
        kl_weights_BT = self.beta * token_weights(mask_BT, self._kl_reduction, **options)
        return ExpectedLoss(
            policy_weights_BT * advantages * inputs.get("importance_sampling_ratio", 1.0),
            kl_weights_BT,
            old_logp_BT,
            self.epsilon_low,
            self.epsilon_high,
        )

    @property
    def _accumulation_steps(self) -> float:
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1

    @property
    def _kl_reduction(self) -> str:
        return self.loss_type if self.args.kl_reduction == "loss_type" else self.args.kl_reduction

    def _reduction_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        steps = self._accumulation_steps
        window_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":
            window_tokens = window_tokens * steps / self.args.steps_per_generation
        return {
            "max_completion_length": cast(int, self.max_completion_length),
            "window_tokens": window_tokens,
            "accumulation_steps": steps,
        }

    def _log_loss(
        self,
        policy_loss: torch.Tensor,
        kl_loss: torch.Tensor | None,
        kls: dict[str, torch.Tensor],
        mask_BT: torch.Tensor,
    ) -> None:
        """Log the loss's parts as means over processes and the KLs as means over loss tokens, in one reduction."""
        parts = {} if kl_loss is None else {"kl_loss": kl_loss}
        if not self._entropy_bonus_enabled:
            # With an entropy bonus TRL logs its own
            parts["policy_loss"] = policy_loss
        sums = [kl_BT.detach().masked_fill(mask_BT == 0, 0.0).sum() for kl_BT in kls.values()]
        summed = total(self.accelerator, torch.stack([*parts.values(), *sums, mask_BT.sum()]))
        counts = [self.accelerator.num_processes] * len(parts) + [max(summed[-1], 1.0)] * len(sums)
        means = [value / count for value, count in zip(summed, counts, strict=False)]
        self._record(zip([*parts, *kls], means, strict=True))


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Tokens that are trained on: neither padding, nor masked truncated completions, nor tool output."""
    mask_BT = inputs["completion_mask"]
    return mask_BT * inputs["tool_mask"] if "tool_mask" in inputs else mask_BT


def _completion_logps(output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output.log_probs[:, -inputs["completion_ids"].size(1) :]
