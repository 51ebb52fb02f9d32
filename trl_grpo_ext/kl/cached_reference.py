"""The reference policy of the exact KL: run once per generated batch, its last hidden states kept."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .._trl import head_settings, use_adapter
from .model_forward import ModelCall, add_exact_kl, leaf_head
from .reference import REFERENCE_ADAPTER


def base_language_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under PEFT, on which TRL patches `forward`."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _checked_head(model: PreTrainedModel) -> nn.Linear:
    head = leaf_head(model)
    if head.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"kl_estimator='exact' multiplies by the weight of the LM head, which is quantised to {head.weight.dtype} "
            f"({type(head).__name__}). Leave the head as it is, for instance with "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head']), or use 'k3'."
        )
    return head


class OnSync(TrainerCallback):
    """Does `action` whenever TRL's callback moves a separate reference: every `ref_model_sync_steps` steps."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_step_end(self, args: Any, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            self.action()


class CachedReference:
    """
    Catches TRL's own reference pass, so that image inputs and adapters stay TRL's business, and keeps its states.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        ref_model (`nn.Module` or `None`):
            TRL's separate reference model, as prepared by accelerate; `None` with PEFT, where it is the policy without
            its adapter or with the frozen adapter `"ref"`.
        accelerator (`Accelerator`):
            To unwrap the models.
        logits_memory (`int`):
            Bytes for tiles of logits.
    """

    def __init__(self, model: nn.Module, ref_model: Any, accelerator: Accelerator, logits_memory: int):
        self.policy = model
        self.ref_model = ref_model
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "kl_estimator='exact' needs an adapter inside the layers (LoRA and its kind): prompt learning changes "
                "the sequence that the reference would have to see. Use 'k3', or another PEFT method."
            )
        policy = base_language_model(model)
        settings, own = head_settings(policy.forward), _checked_head(policy)
        with self._model() as active:
            reference = base_language_model(cast(nn.Module, accelerator.unwrap_model(active)))
            other = _checked_head(reference)
        if ref_model is None and own.weight.dtype != other.weight.dtype:
            raise ValueError(
                f"The trained LM head is {own.weight.dtype} and the reference's {other.weight.dtype}: on a quantised "
                "model TRL trains in bfloat16. Load the model with dtype='bfloat16', or leave the head out of "
                "modules_to_save."
            )
        head = weakref.ref(other)
        add_exact_kl(policy, settings, head, logits_memory)
        if ref_model is not None:
            add_exact_kl(reference, settings, head, logits_memory)
        self._hidden_states: list[torch.Tensor] = []

    def is_reference(self, model: nn.Module) -> bool:
        """Whether a forward of `model` now is the reference's, which with PEFT depends on the active adapter."""
        if self.ref_model is not None:
            return model is self.ref_model
        status = cast(PeftModel, self.policy).get_model_status()
        return status.enabled is False or status.active_adapters == [REFERENCE_ADAPTER]

    def recorded(self, model: nn.Module, num_tokens: int) -> ModelCall:
        """`model` to call for a reference pass, in as many slices as TRL likes, over the last `num_tokens` tokens."""
        self._hidden_states = []

        def keep(output: Any) -> None:
            # A copy, so that the prompt's hidden states can be freed
            self._hidden_states.append(output.hidden_states[:, -num_tokens:].clone())

        return ModelCall(model, keep, keep_hidden_states=True)

    def take(self) -> torch.Tensor:
        """Hidden states `(B, T, H)` of the batch just generated, handed over once."""
        slices, self._hidden_states = self._hidden_states, []
        if not slices:
            raise RuntimeError("TRL generated a batch without a pass of the reference; the exact KL needs one.")
        return torch.cat(slices)

    @contextmanager
    def _model(self) -> Iterator[nn.Module]:
        """The reference, to be called inside the context."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = cast(PeftModel, self.policy)
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield policy

    def rerunning(self, model: nn.Module, num_tokens: int) -> Callable[..., Any]:
        """`model` to call where the kept states are of a reference that has moved: it runs the reference again."""

        def call(**kwargs: Any) -> Any:
            with torch.no_grad(), self._model() as reference:
                hidden_states = reference(**kwargs, keep_hidden_states=True).hidden_states
            return model(**kwargs, ref_hidden_states=hidden_states[:, -num_tokens:])

        return call
