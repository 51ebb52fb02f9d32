"""The KL's reference under PEFT: the model without its adapter, or with a frozen one named `"ref"`, which can move."""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import TrainerCallback

from .._trl import SyncRefModelCallback


REFERENCE_ADAPTER = "ref"
_POLICY_ADAPTER = "default"

# Initialisations that change the base weights, by the start of their PEFT names
_INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def prepare_adapter_reference(model: PeftModel, moves: bool) -> None:
    """
    See to it that the reference is the model as it starts, and can be moved.

    Without a frozen adapter `"ref"` the reference is the model without its adapter, which is the model as it starts
    where the adapter is a fresh one. A reference that moves needs one, and gets a copy of the adapter. Of a continued
    adapter TRL has made one already, but copied only the parameters named `*.default.*`; those of parameter dicts are
    named `*.default`: of embeddings under LoRA, of IA3, VeRA, LoHa and others.

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
    if moves and (model.active_peft_config.is_prompt_learning or config["peft_type"] == PeftType.ADALORA):
        raise ValueError(
            "sync_ref_model needs an adapter inside the layers (LoRA and its kind), beside which the reference is a "
            f"second one; {config['peft_type']} is no such. Use sync_ref_model=False, or another PEFT method."
        )
    if moves and REFERENCE_ADAPTER not in model.peft_config:
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config[_POLICY_ADAPTER])
    if REFERENCE_ADAPTER not in model.peft_config:
        return
    for reference, policy in _pairs(model).values():
        # Other than by `copy_` it takes the dtype too
        reference.data = policy.data.clone()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
            module.p = 0.0


def adapter_reference(model: PeftModel) -> dict[str, torch.Tensor]:
    """The frozen adapter's parameters by name; none where the reference is the model without its adapter."""
    if REFERENCE_ADAPTER not in model.peft_config:
        return {}
    return {name: reference for name, (reference, _) in _pairs(model).items()}


def move_adapter_reference(model: PeftModel, alpha: float) -> None:
    """
    `ref <- (1 - alpha) ref + alpha policy` for every parameter of the adapter, sharded or not.

    It is parameters that are mixed, as by TRL's callback for whole models: of LoRA, A and B each.
    """
    references, policies = zip(*_pairs(model).values(), strict=True)
    SyncRefModelCallback.sync_target_model(nn.ParameterList(policies), nn.ParameterList(references), alpha)


def _pairs(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both adapters, reference and policy, by the name of the reference's."""
    parameters, pairs = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, policy in parameters.items():
        reference_name = re.sub(rf"\.{_POLICY_ADAPTER}(?=\.|$)", f".{REFERENCE_ADAPTER}", name)
        if reference_name != name:
            pairs[reference_name] = (parameters[reference_name], policy)
    return pairs


class OnSync(TrainerCallback):
    """
    Call `action` whenever TRL's callback moves a separate reference: every `ref_model_sync_steps` optimizer steps.

    Args:
        action (`Callable[[], None]`):
            What to do. Callbacks run in the order in which they were added.
    """

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_step_end(self, args: Any, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            self.action()
