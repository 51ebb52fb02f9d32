"""The KL's reference under PEFT: the model without its adapter, or with a frozen one named `"ref"`, which can move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import TrainerCallback

from .._trl import SyncRefModelCallback


REFERENCE_ADAPTER = "ref"

# The attribute of a model whose adapter "ref" is of this package
_MADE_HERE = "has_reference_adapter_of_trl_grpo_ext"
# The one PEFT method whose parameters do not have the adapter's name in theirs
_WITHOUT_NAME = "adaption_"
# Initialisations that change the base weights, by the start of their PEFT names
_INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def keep_requires_grad(model: nn.Module) -> Iterator[None]:
    """
    Which of the model's parameters train is the same after the context as before.

    PEFT turns `requires_grad` on for the whole adapter that it activates. A part of it that the user has frozen, or an
    adapter that was loaded with `is_trainable=False`, would train from then on.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Every module of the model is in evaluation mode inside the context, and in its own mode again after it.

    Whatever is random in a forward pass asks for the mode of its own module: layers of dropout, attention that is
    given a probability, the dropout of an adapter, the jitter of a router. Linear layers, in which nothing is random,
    stay as they are: on a CPU bitsandbytes packs a quantised one anew in evaluation mode, with other scales.
    """
    trained = [module for module in model.modules() if module.training and not isinstance(module, nn.Linear)]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


def is_reference(model: Any, ref_model: Any, policy: nn.Module) -> bool:
    """
    Whether a forward pass of `model` now is the reference's, which with PEFT depends on the active adapter.

    Args:
        model (`nn.Module`):
            The model that is about to run.
        ref_model (`nn.Module` or `None`):
            TRL's separate reference model. `None` with PEFT.
        policy (`nn.Module`):
            The policy, unwrapped.
    """
    if ref_model is not None or not isinstance(policy, PeftModel):
        return model is ref_model
    status = policy.get_model_status()
    return status.enabled is False or status.active_adapters == [REFERENCE_ADAPTER]


def policy_adapter(model: PeftModel) -> str:
    """
    The name of the adapter that is trained.

    Raises:
        ValueError: several are active, so that no single one can be copied.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"the adapters {', '.join(model.active_adapters)} are active at once; the KL's reference needs one. "
            "Activate it with model.set_adapter(name), or use beta=0."
        )
    return model.active_adapters[0]


def check_adapter(model: PeftModel, *, moves: bool, needs_copy: bool) -> None:
    """
    Raise `ValueError` where the model has no reference to go back to, or none that could move.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        moves (`bool`):
            Whether the reference is to move.
        needs_copy (`bool`):
            Whether the reference has to be an adapter of its own.
    """
    name = policy_adapter(model)
    _check_names(model, name)
    adapter_config = model.peft_config[name]
    config = adapter_config.to_dict()
    # Not every PEFT method has these two
    bias = config.get("bias", "none")
    init = config.get("init_lora_weights")
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
    if moves and adapter_config.is_prompt_learning:
        raise ValueError(
            "sync_ref_model needs an adapter inside the layers (LoRA and its kind), beside which the reference is a "
            f"second one; {config['peft_type']} is no such. Use sync_ref_model=False, or another PEFT method."
        )
    if needs_copy and config["peft_type"] == PeftType.ADALORA:
        raise ValueError(
            "ADALORA allows one adapter that trains, beside which the reference would be a second one. Pass the model "
            "without its adapter and `peft_config=AdaLoraConfig(...)`, with sync_ref_model=False; or use another PEFT "
            "method."
        )
    _check_frozen_base(model)


def _check_names(model: PeftModel, policy_name: str) -> None:
    if policy_name == REFERENCE_ADAPTER:
        raise ValueError(
            f"the adapter that is trained is called {REFERENCE_ADAPTER!r}, which is the name of the KL's reference. "
            "Load it under another name (`adapter_name=...`), or use beta=0."
        )
    if REFERENCE_ADAPTER in model.peft_config and _MADE_HERE not in model.__dict__:
        raise ValueError(
            f"the model has an adapter called {REFERENCE_ADAPTER!r} that this package has not made, and the KL's "
            f"reference needs the name. Load yours under another name, or delete it with "
            f"`model.delete_adapter({REFERENCE_ADAPTER!r})`."
        )


def _check_frozen_base(model: PeftModel) -> None:
    """Raise `ValueError` if a parameter outside the adapters trains: the reference would move with it."""
    for name, parameter in model.named_parameters():
        in_adapter = not set(model.peft_config).isdisjoint(name.split(".")) or _WITHOUT_NAME in name
        if parameter.requires_grad and not in_adapter:
            raise ValueError(
                f"'{name}' trains and belongs to no adapter, so the KL's reference, which is the model without the "
                "adapter, would move with it. List its module in modules_to_save of the PEFT config, freeze it, or "
                "use beta=0."
            )


def prepare_adapter_reference(model: PeftModel, needs_copy: bool) -> None:
    """
    Make the frozen adapter `"ref"` a copy of the adapter as it starts.

    There are two references under PEFT:

    - Without an adapter `"ref"` the reference is the model without its adapter. This is the model as it starts if the
      adapter is a fresh one.
    - With an adapter `"ref"` the reference is that one. A continued adapter needs it, and so does a reference that
      moves. A model that has trained before has one already, of another start and perhaps of another configuration:
      it is replaced.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        needs_copy (`bool`):
            Whether the reference has to be an adapter of its own.
    """
    if not needs_copy:
        return
    policy = policy_adapter(model)
    # The new adapter's random start, which is overwritten, leaves the random numbers of the training alone
    with keep_requires_grad(model), torch.random.fork_rng():
        if REFERENCE_ADAPTER in model.peft_config:
            model.delete_adapter(REFERENCE_ADAPTER)
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config[policy])
    # Copied with the model, unlike an entry in a registry
    model.__dict__[_MADE_HERE] = True
    for reference_parameter, policy_parameter in _pairs(model, policy).values():
        # Other than `copy_`, this takes the dtype too
        reference_parameter.data = policy_parameter.data.clone()
        reference_parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
            module.p = 0.0


def adapter_reference(model: PeftModel) -> dict[str, torch.Tensor]:
    """The frozen adapter's parameters by name; none where the reference is the model without its adapter."""
    if REFERENCE_ADAPTER not in model.peft_config:
        return {}
    pairs = _pairs(model, policy_adapter(model))
    return {name: reference for name, (reference, _) in pairs.items()}


def move_adapter_reference(model: PeftModel, alpha: float) -> None:
    """
    Move every parameter of the frozen adapter towards the policy's, sharded or not:

        ref <- (1 - alpha) ref + alpha policy

    The parameters are mixed, of LoRA A and B each, as TRL's callback does it for whole models.
    """
    pairs = _pairs(model, policy_adapter(model)).values()
    references = nn.ParameterList([reference for reference, _ in pairs])
    policies = nn.ParameterList([policy for _, policy in pairs])
    SyncRefModelCallback.sync_target_model(policies, references, alpha)


def _pairs(model: nn.Module, policy_name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both adapters, reference and policy, by the name of the reference's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = {}
    for name, reference in parameters.items():
        # The last one: a module above may have the name too, as it may have the policy's
        before, found, after = f".{name}.".rpartition(f".{REFERENCE_ADAPTER}.")
        policy_name_of_it = f"{before}.{policy_name}.{after}".strip(".")
        if found and policy_name_of_it in parameters:
            pairs[name] = (reference, parameters[policy_name_of_it])
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
