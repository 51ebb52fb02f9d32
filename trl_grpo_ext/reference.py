"""The reference policy of the exact KL: run once per generated batch, its last hidden states kept."""

import copy
import itertools
import weakref
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ._upstream import head_settings
from .policy_forward import ModelCall, ReferenceHead, add_exact_kl


def base_language_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under PEFT, on which TRL patches `forward`."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


# Initialisations that change the base weights, by the start of their PEFT names
_INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def prepare_adapter_reference(model: PeftModel) -> None:
    """
    See to it that the reference, the model without its adapter or its frozen copy `"ref"`, is the model as it starts.

    TRL copies the adapter's parameters named `*.default.*` into `"ref"`. Those of parameter dicts are named
    `*.default`: of embeddings under LoRA, of IA3, VeRA, LoHa and others. They are copied here.

    Raises:
        ValueError: the adapter changes weights outside itself, so that there is no such reference.
    """
    config = model.active_peft_config.to_dict()
    # Not every PEFT method has these two
    bias, init = config.get("bias", "none"), config.get("init_lora_weights")
    if bias != "none":
        raise ValueError(
            f"bias={bias!r} in the PEFT config trains the base model's biases, and the KL's reference would move with "
            "them. Use bias='none', or beta=0."
        )
    if isinstance(init, str) and init.startswith(_INITS_THAT_MOVE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base weights, so that the model without its adapter is not the "
            "model before training, which the KL's reference must be. Use the default initialisation, or beta=0."
        )
    if "ref" not in model.peft_config:
        return
    tensors = dict(
        itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(".default"):
                tensors[name.removesuffix("default") + "ref"].copy_(tensor)


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
        moves (`bool`):
            Whether the reference is updated during training (`sync_ref_model`). A batch keeps the reference that it
            was generated with, so its head is then copied for each.
        logits_memory (`int`):
            Bytes for tiles of logits.
    """

    def __init__(self, model: nn.Module, ref_model: Any, accelerator: Accelerator, moves: bool, logits_memory: int):
        self.policy = model
        self.ref_model = ref_model
        self.moves = moves
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "kl_estimator='exact' needs an adapter inside the layers (LoRA and its kind): prompt learning changes "
                "the sequence that the reference would have to see. Use 'k3', or another PEFT method."
            )
        policy = base_language_model(model)
        settings, self._head = head_settings(policy.forward), ReferenceHead(model)
        # The models outlive the trainer, and would keep the reference's head
        head = weakref.proxy(self._head)
        add_exact_kl(policy, settings, head, logits_memory)
        if ref_model is not None:
            reference = cast(PreTrainedModel, accelerator.unwrap_model(ref_model))
            add_exact_kl(reference, settings, head, logits_memory)
        self._hidden_states: list[torch.Tensor] = []

    def is_reference(self, model: nn.Module) -> bool:
        """Whether a forward of `model` now is the reference's, which with PEFT depends on the active adapter."""
        if self.ref_model is not None:
            return model is self.ref_model
        status = cast(PeftModel, self.policy).get_model_status()
        return status.enabled is False or status.active_adapters == ["ref"]

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
        if self.moves:
            self._head.module = copy.deepcopy(self._head.module)
        return torch.cat(slices)
