"""
The reference policy of the exact KL: run once per generated batch, after which its last hidden states are kept.

The hidden states take this way:

1. TRL runs its reference pass through [`CachedReference.hidden_state_forward`], whose output holds them in place of
   log-probs. What TRL makes of them is the batch's `ref_per_token_logps`.
2. [`take_hidden_states`] moves them to the batch's key `ref_hidden_states`, which TRL shuffles and splits as the rest.
3. [`CachedReference.policy_forward`] hands them to the policy's forward pass, as its keyword `ref_hidden_states`.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._trl import head_settings, let_copies_compute, use_adapter
from .fused.predicted_gradient import SecondPassCount
from .model_forward import ExactKLHead, active_lm_head, add_exact_kl
from .reference import REFERENCE_ADAPTER, evaluation_mode, keep_requires_grad
from .supported import check_vocabularies


class CachedReference:
    """
    The reference of the exact KL, and the forwards of policy and reference that the KL needs.

    It runs inside TRL's own reference pass, so that image inputs and adapters stay TRL's business.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        ref_model (`nn.Module` or `None`):
            TRL's separate reference model, as prepared by accelerate. `None` with PEFT, where the reference is the
            policy without its adapter or with the frozen adapter `"ref"`.
        accelerator (`Accelerator`):
            To unwrap the models.
        logits_memory_bytes (`int` or `None`):
            Bytes that logits may take at one moment.
        direction (`str`):
            A key of [`~trl_grpo_ext.kl.divergences.DIVERGENCES`].

    Attributes:
        second_pass ([`~trl_grpo_ext.kl.fused.predicted_gradient.SecondPassCount`]):
            How many tokens went through the LM head a second time.

    Raises:
        ValueError: the adapter changes the sequence, the LM head is quantised, or the reference has another
            vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: Any,
        accelerator: Accelerator,
        *,
        logits_memory_bytes: int | None,
        direction: str,
    ):
        self.ref_model = ref_model
        self.second_pass = SecondPassCount()
        self._policy = model
        self._accelerator = accelerator
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "kl_estimator='exact' needs an adapter inside the layers (LoRA and its kind): prompt learning changes "
                "the sequence that the reference would have to see. Use 'k3', or another PEFT method."
            )
        # Before the first patch of `forward`, which hides TRL's
        settings = head_settings(causal_language_model(model).forward)
        self._kl_head = ExactKLHead(settings, logits_memory_bytes, direction, self.second_pass)
        self._patched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.use(ref_model)

    def use(self, ref_model: Any) -> None:
        """
        Compare with this reference from now on. Hidden states that are kept are those of the one before.

        Args:
            ref_model (`nn.Module` or `None`):
                As for the class.

        Raises:
            ValueError: there is no reference, it has another vocabulary than the policy, or an LM head is quantised.
        """
        if ref_model is None and not isinstance(self._policy, PeftModel):
            raise ValueError(
                "trainer.ref_model is None, and the policy has no adapter without which it would be the reference. "
                "Set a model, or trainer.beta to 0."
            )
        self.ref_model = ref_model
        policy = causal_language_model(self._policy)
        policy_head = _checked_lm_head(policy)
        with self._active_model() as active_model:
            reference = causal_language_model(cast(nn.Module, self._accelerator.unwrap_model(active_model)))
            reference_head = _checked_lm_head(reference)
        check_vocabularies(policy.config, reference.config)
        if ref_model is None and policy_head.weight.dtype != reference_head.weight.dtype:
            raise ValueError(
                f"The trained LM head is {policy_head.weight.dtype} and the reference's "
                f"{reference_head.weight.dtype}: on a quantised model TRL trains in bfloat16. Load the model with "
                "dtype='bfloat16', or leave the head out of modules_to_save."
            )
        self._kl_head.reference_head = weakref.ref(reference_head)
        if not self._patched:
            let_copies_compute(policy)
        for model in {policy, reference} - set(self._patched):
            add_exact_kl(model)
            self._patched.add(model)

    def hidden_state_forward(self, model: nn.Module, num_tokens: int) -> Callable[..., Any]:
        """
        The reference's forward, whose output holds hidden states in place of log-probs.

        TRL cuts the completion's positions out of `log_probs`, concatenates its batches, and returns the result,
        whatever its last dimension: `(B, T, H)` instead of `(B, T)`.

        Args:
            model (`nn.Module`):
                The reference.
            num_tokens (`int`):
                T, the width of the completions.
        """

        def forward(**kwargs: Any) -> Any:
            # With PEFT the reference is the policy in training, and its dropout would be a difference between the two
            with evaluation_mode(model):
                output = model(**kwargs, return_hidden_states=True)
            # A copy, so that the prompts' hidden states can be freed
            output.log_probs = output.log_probs[:, -num_tokens:].clone()
            return output

        return forward

    def policy_forward(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Callable[..., Any]:
        """
        The policy's forward, with the KL to the reference in its output.

        Args:
            model (`nn.Module`):
                The policy.
            inputs (`dict[str, Any]`):
                A micro-batch. Its `ref_hidden_states` are taken out. Without them, because the reference has moved
                since the batch was scored, the reference is run again.
            **options:
                Further keyword arguments of the model's forward, see [`add_exact_kl`].
        """
        cached_BTH = inputs.pop("ref_hidden_states", None)
        num_tokens = inputs["completion_ids"].size(1)

        def forward(**kwargs: Any) -> Any:
            ref_hidden_BTH = self._hidden_states(num_tokens, **kwargs) if cached_BTH is None else cached_BTH
            return model(**kwargs, **options, ref_hidden_states=ref_hidden_BTH, kl_head=self._kl_head)

        return forward

    @torch.no_grad()
    def _hidden_states(self, num_tokens: int, **kwargs: Any) -> torch.Tensor:
        with self._active_model() as reference:
            return self.hidden_state_forward(reference, num_tokens)(**kwargs).log_probs

    @contextmanager
    def _active_model(self) -> Iterator[nn.Module]:
        """The reference, to be called inside the context."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = cast(PeftModel, self._policy)
        adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None
        with keep_requires_grad(policy), use_adapter(policy, adapter):
            yield policy


def take_hidden_states(batch: dict[str, Any]) -> torch.Tensor:
    """
    Take the reference's hidden states `(B, T, H)` out of a batch that TRL has just scored.

    Raises:
        RuntimeError: TRL made no reference pass, or one that did not go through
            [`CachedReference.hidden_state_forward`].
    """
    hidden_BTH = batch.pop("ref_per_token_logps", None)
    if hidden_BTH is None or hidden_BTH.dim() != 3:
        raise RuntimeError("TRL generated a batch without a pass of the reference; the exact KL needs one.")
    return hidden_BTH


def causal_language_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under PEFT, on which TRL patches `forward`."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _checked_lm_head(model: PreTrainedModel) -> nn.Linear:
    head = active_lm_head(model)
    if head.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"kl_estimator='exact' multiplies by the weight of the LM head, which is quantised to {head.weight.dtype} "
            f"({type(head).__name__}). Leave the head as it is, for instance with "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head']), or use 'k3'."
        )
    return head
