"""The part of the trainer that knows the KL: its reference, and its term in the loss."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from .._swapped import swapped
from .._trl import GRPOTrainer, SyncRefModelCallback, let_copies_compute
from ..config import GRPOExtConfig
from ..distributed import total
from ..loss import (
    CLIPPED_LOSSES,
    ClippedLossGradient,
    completion_logps,
    importance_ratio,
    loss_mask,
    reduce_tokens,
    sequence_token_old_logps,
    token_weights,
    window_tokens,
)
from .cached_reference import CachedReference, causal_language_model, take_hidden_states
from .estimates import kl_estimate, weight_by_ratio
from .initial_kl import explain_difference, tolerance
from .own_logits import OwnLogits
from .reference import (
    OnSync,
    adapter_reference,
    check_adapter,
    evaluation_mode,
    is_reference,
    keep_requires_grad,
    move_adapter_reference,
    prepare_adapter_reference,
)
from .supported import check_head_cast, check_model, check_router_loss, check_vocabularies


logger = logging.get_logger(__name__)


class KLTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with the KL estimators and reductions of [`GRPOExtConfig`], and a reference that can move.

    Args:
        args ([`GRPOExtConfig`]):
            The settings.
        **kwargs:
            TRL's other arguments, by name.
    """

    args: GRPOExtConfig

    def __init__(self, *, model: Any, args: GRPOExtConfig, **kwargs: Any):
        if args.beta != 0.0 and isinstance(model, PeftModel):
            check_adapter(model, moves=args.sync_ref_model, needs_copy=True)
        # Of a model that has an adapter already, TRL makes a frozen copy to be the reference. It looks for an adapter
        # called "default", and fails for a model that has trained before, which has a copy. With `beta` at 0 it leaves
        # the reference to this package. TRL also refuses to move a reference under PEFT.
        continues = isinstance(model, PeftModel) and args.beta != 0.0
        has_adapter = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        check_head_cast(model, args, has_adapter=has_adapter)
        with swapped(args, sync_ref_model=False, beta=0.0 if continues else args.beta):
            super().__init__(model=model, args=args, **kwargs)
        self.beta = args.beta
        language_model = causal_language_model(cast(nn.Module, self.model))
        check_model(language_model, is_exact=args.kl_estimator == "exact")
        if args.kl_estimator != "exact":
            check_router_loss(language_model.config, is_weighted=self.aux_loss_enabled)
        self._sequence_token = args.importance_sampling_level == "sequence_token"
        if self._sequence_token:
            # TRL's loss is the token-level one; the ratio's value comes in through the old log-probs
            self.importance_sampling_level = "token"
        self._exact_kl = self._prepare_reference(continues)
        if self._exact_kl is None:
            let_copies_compute(language_model)
        self._loaded_from_path = isinstance(model, str)
        # `None` before the first batch
        self._start_is_checked: bool | None = None
        self._own_logits = OwnLogits(self.accelerator, args.temperature, cast(int, self._tokenizer.pad_token_id))

    def _prepare_reference(self, continues: bool) -> CachedReference | None:
        """
        Make sure that the reference is right, and moves if it is to; the exact KL caches its hidden states.

        Args:
            continues (`bool`):
                Whether the model came with an adapter, which then starts from where it is and not from nothing.
        """
        moves = self.args.sync_ref_model
        if moves and self.is_fsdp_enabled and cast(Any, self.accelerator.state.fsdp_plugin).fsdp_version == 1:
            raise ValueError("sync_ref_model does not know the flat parameters of FSDP1. Use fsdp_version: 2.")
        if self.beta != 0.0 and isinstance(self.model, PeftModel):
            # An adapter that TRL has just made of `peft_config`; one that came with the model is checked already
            if not continues:
                check_adapter(self.model, moves=moves, needs_copy=moves)
            prepare_adapter_reference(self.model, needs_copy=moves or continues)
        cached = None
        if self.args.kl_estimator == "exact":
            cached = CachedReference(
                cast(nn.Module, self.model),
                self.ref_model,
                self.accelerator,
                logits_memory_bytes=self.args.logits_memory_bytes,
                direction=self.args.kl_direction,
            )
        elif self.ref_model is not None:
            ref_config = self._unwrapped(self.ref_model).config
            check_vocabularies(cast(Any, self.model).config, ref_config, num_tokens=len(self._tokenizer))
        if moves and self.ref_model is not None:
            self.add_callback(SyncRefModelCallback(cast(nn.Module, self.ref_model), self.accelerator))
        if moves:
            self.add_callback(OnSync(self._on_sync))
        return cached

    def _on_sync(self) -> None:
        """Move the reference, unless TRL's callback has done so, and drop the hidden states of the old one."""
        if self.ref_model is None:
            move_adapter_reference(self._unwrapped(self.model), self.args.ref_model_mixup_alpha)
        self._drop_hidden_states()

    def _drop_hidden_states(self) -> None:
        for batch in self._buffered_inputs or []:
            batch.pop("ref_hidden_states", None)

    def _follow_reference(self) -> None:
        """Compare with the `ref_model` of now, which a callback may have set, as TRL does."""
        reference = self._exact_kl
        if reference is not None and self.beta != 0.0 and reference.ref_model is not self.ref_model:
            reference.use(self.ref_model)
            self._drop_hidden_states()

    def _unwrapped(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)

    def _reference_parameters(self) -> dict[str, torch.Tensor]:
        """By name, the parameters of the reference that a checkpoint has to hold."""
        model = self._unwrapped(self.model)
        # A callback may have set `beta` to 0 for a while
        if self.args.beta != 0.0 and isinstance(model, PeftModel):
            return adapter_reference(model)
        moves = self.args.sync_ref_model and self.ref_model is not None
        return dict(self._unwrapped(self.ref_model).named_parameters()) if moves else {}

    def per_token_kl(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """
        KL of the policy to the reference at each completion token, as the loss reduces it.

        A subclass may override it, for `kl_estimator="k3"` too:

        ```python
        >>> class BoundedKL(GRPOExtTrainer):
        ...     def per_token_kl(self, output, inputs):
        ...         return super().per_token_kl(output, inputs).clamp(max=10.0)
        ```

        Args:
            output (`FusedCausalLMOutput`):
                Of the policy's forward pass, with `log_probs`; with the exact KL also `kl` and `ref_log_probs`.
            inputs (`dict[str, Any]`):
                The micro-batch as it was scored.

        Returns:
            `torch.Tensor` of shape `(B, T)`, nats, differentiable. Values outside the loss mask are ignored.
        """
        estimator = self.args.kl_estimator
        if estimator == "exact":
            return output.kl
        logp_BT = completion_logps(output, inputs)
        kl_BT = kl_estimate(logp_BT, inputs["ref_per_token_logps"], estimator)
        if not self.args.use_bias_correction_kl:
            return kl_BT
        old_logp_BT = inputs.get("old_per_token_logps", logp_BT.detach())
        ratio = importance_ratio(logp_BT, old_logp_BT, loss_mask(inputs), self.importance_sampling_level)
        return weight_by_ratio(kl_BT, ratio, estimator)

    @property
    def _keeps_trl_kl(self) -> bool:
        """Whether the KL term of the loss, if any, is TRL's own."""
        return self.args.uses_trl_kl and self.per_token_kl == MethodType(KLTrainer.per_token_kl, self)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        forward = model
        mode: AbstractContextManager[Any] = nullcontext()
        may_change = not (self.args.uses_trl_kl or torch.is_grad_enabled())
        if may_change and is_reference(model, self.ref_model, self._unwrapped(self.model)):
            if self._exact_kl is not None:
                forward = self._exact_kl.hidden_state_forward(model, logits_to_keep)
            else:
                mode = evaluation_mode(model)
        with mode:
            return super()._get_per_token_logps_and_entropies(
                forward, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _generate_and_score_completions(self, inputs):
        self._follow_reference()
        # TRL activates the reference's adapter here, whereupon PEFT lets all of the policy's train
        with keep_requires_grad(cast(nn.Module, self.model)):
            output = super()._generate_and_score_completions(inputs)
        # A callback may have set `beta` to 0, and then TRL runs no reference
        if self._exact_kl is not None and self.beta != 0.0:
            output["ref_hidden_states"] = take_hidden_states(output)
            self._own_logits.check(self.model, output, super()._get_per_token_logps_and_entropies)
        return output

    def _compute_loss(self, model, inputs):
        self._follow_reference()
        inputs = dict(inputs)
        outputs: list[Any] = []
        policy_forward = model
        # With `beta` at 0 for the sake of the routers' loss, which TRL cannot make of all families
        if self._exact_kl is not None and (self.beta != 0.0 or self.aux_loss_enabled):
            predicted_gradient = self._predicted_gradient(inputs)
            policy_forward = self._exact_kl.policy_forward(model, inputs, predicted_gradient=predicted_gradient)

        # TRL's loss does nothing with its `model` but call it
        def observed_forward(**kwargs: Any) -> Any:
            output = policy_forward(**kwargs)
            outputs.append(output)
            if self._sequence_token:
                self._set_sequence_ratio(output, inputs)
            return output

        # With `beta` at 0, TRL's loss has neither its KL term nor its KL metric
        with swapped(self, beta=self.beta if self._keeps_trl_kl else 0.0):
            loss = super()._compute_loss(observed_forward, inputs)
        return self._add_kl(loss, outputs[0], inputs)

    def _set_sequence_ratio(self, output: Any, inputs: dict[str, Any]) -> None:
        # Without old log-probs every ratio is 1
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = sequence_token_old_logps(
                completion_logps(output, inputs), inputs["old_per_token_logps"], loss_mask(inputs)
            )

    def _add_kl(self, loss: torch.Tensor, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Add our KL term to TRL's loss, unless that holds its own, and log both parts."""
        steps = self._accumulation_steps
        mask_BT = loss_mask(inputs)
        policy_loss = loss.detach()
        if self.aux_loss_enabled:
            policy_loss = policy_loss - self.router_aux_loss_coef * output.aux_loss.detach() / steps
        if self.beta == 0.0:
            self._observe_tokens(output, None)
            self._log_loss(policy_loss * steps, None, {}, mask_BT)
            return loss
        self._check_start(output, inputs)
        # TRL's own term is computed once more for the log only
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._keeps_trl_kl):
            kl_BT = self.per_token_kl(output, inputs)
            kl_loss = self.beta * reduce_tokens(kl_BT, mask_BT, self._kl_reduction, **self._reduction_options(inputs))
        self._observe_tokens(output, kl_BT)
        if self._keeps_trl_kl:
            self._log_loss((policy_loss - kl_loss) * steps, kl_loss * steps, {}, mask_BT)
            return loss
        kls = {"kl": kl_BT, **self._sampled_estimates(output, inputs)}
        self._log_loss(policy_loss * steps, kl_loss.detach() * steps, kls, mask_BT)
        return loss + kl_loss

    def _observe_tokens(self, output: Any, kl_BT: torch.Tensor | None) -> None:
        """What a subclass may log of each token: the policy's forward, and the KL that the loss reduces, if any."""

    def _check_start(self, output: Any, inputs: dict[str, Any]) -> None:
        """Raise or warn, once, if the policy differs from the reference before the first update."""
        if self._mode != "train":
            return
        if self._start_is_checked is None:
            # A resumed run's policy has moved
            self._start_is_checked = self.state.global_step > 0
        if self._start_is_checked:
            return
        logp_BT = completion_logps(output, inputs).detach()
        is_exact = self.args.kl_estimator == "exact"
        ref_logp_BT = output.ref_log_probs if is_exact else inputs["ref_per_token_logps"]
        mask_BT = loss_mask(inputs)
        kl_BT = kl_estimate(logp_BT, ref_logp_BT, "k3").masked_fill(mask_BT == 0, 0.0)
        kl, tokens = total(self.accelerator, torch.stack([kl_BT.sum(), mask_BT.sum()]))
        if tokens == 0:
            # Nothing has moved the policy yet: the next batch shows it
            return
        self._start_is_checked = True
        mean = kl / tokens
        model = self._unwrapped(self.model)
        dtype = torch.bfloat16 if self.args.bf16 or self.args.fp16 else model.dtype
        if mean <= tolerance(dtype):
            return
        message, is_mistake = explain_difference(
            mean,
            model,
            model.config,
            from_path=self._loaded_from_path,
            neftune_noise_alpha=self.args.neftune_noise_alpha,
        )
        if is_mistake:
            raise ValueError(message)
        logger.warning(message)

    def _sampled_estimates(self, output: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Beside an exact KL, for the log: the estimates from the same tokens."""
        if self.args.kl_estimator != "exact":
            return {}
        logp_BT = completion_logps(output, inputs).detach()
        return {f"kl/{name}": kl_estimate(logp_BT, output.ref_log_probs, name) for name in ("k1", "k3")}

    def _predicted_gradient(self, inputs: dict[str, Any]) -> ClippedLossGradient | None:
        """The gradient of the loss that is known before the loss; `None` where it depends on more than one token."""
        old_logp_BT = inputs.get("old_per_token_logps")
        clips = self.loss_type in CLIPPED_LOSSES and self.args.importance_sampling_level == "token"
        # At a ratio of 1 the gradient of all loss types is the same
        if old_logp_BT is not None and not clips:
            return None
        mask_BT = loss_mask(inputs)
        options = self._reduction_options(inputs)
        advantages = inputs["advantages"] if inputs["advantages"].ndim == 2 else inputs["advantages"].unsqueeze(1)
        policy_weights_BT = token_weights(mask_BT, self.loss_type, **options)
        return ClippedLossGradient(
            policy_weights_BT * advantages * inputs.get("importance_sampling_ratio", 1.0),
            self.beta * token_weights(mask_BT, self._kl_reduction, **options),
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
        return {
            "max_completion_length": cast(int, self.max_completion_length),
            "window_tokens": window_tokens(
                inputs["num_items_in_batch"],
                self.accelerator.num_processes,
                steps,
                cast(int, self.args.steps_per_generation) if self._mode == "train" else 1,
            ),
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
        *totals, tokens = total(self.accelerator, torch.stack([*parts.values(), *sums, mask_BT.sum()]))
        for name, value in zip([*parts, *kls], totals, strict=True):
            count = self.accelerator.num_processes if name in parts else max(tokens, 1.0)
            self._record({name: value / count})

    @property
    def _mode(self) -> str:
        """Where TRL's metrics of this moment go."""
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _record(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the share of tokens that took the exact KL's second pass since the last log of training."""
        if self._exact_kl is not None and self._mode == "train":
            counts = torch.tensor(self._exact_kl.second_pass.take(), device=self.accelerator.device)
            second_pass_tokens, tokens = total(self.accelerator, counts)
            if tokens:
                self._record({"kl/second_pass_share": second_pass_tokens / tokens})
        super().log(logs, start_time)
