"""
Everything that this package relies on in TRL, checked once at import.

TRL's underscore methods are not a public API. Whatever is overridden, called or read is listed here, so that a TRL
that differs stops the import with the name of what changed, instead of training something else.
"""

import inspect
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import trl
from trl.models.utils import prepare_deepspeed
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    use_adapter,
)


__all__ = [
    "ADVANTAGE_EPS",
    "FusedCausalLMOutput",
    "GRPOConfig",
    "GRPOTrainer",
    "HeadSettings",
    "SyncRefModelCallback",
    "get_config_model_id",
    "head_settings",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "use_adapter",
]

# The constant that TRL adds to the standard deviation of rewards
ADVANTAGE_EPS = 1e-4

# Overridden or called methods and their parameters after `self`; `...` marks that more may follow
_PARAMETERS = {
    "_tokenize_prompts": ["prompts"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep", ...],
    "_compute_loss": ["model", "inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_save_checkpoint": ["model", "trial"],
}

# Attributes that a method has to read or set for our overrides to mean what they say
_ATTRIBUTES = {
    "__init__": {
        "beta",
        "ref_model",
        "reward_funcs",
        "reward_func_names",
        "reward_weights",
        "importance_sampling_level",
        "num_generations",
        "num_generations_eval",
        "scale_rewards",
        "multi_objective_aggregation",
        "max_completion_length",
        "epsilon_low",
        "epsilon_high",
        "aux_loss_enabled",
        "router_aux_loss_coef",
        "rollout_func",
        "_entropy_bonus_enabled",
        "_is_vlm",
        "_logs",
        "_metrics",
        "_tokenizer",
    },
    "_generate_and_score_completions": {
        "_calculate_rewards",
        "_get_per_token_logps_and_entropies",
        "beta",
        "ref_model",
    },
    "_compute_loss": {
        "current_gradient_accumulation_steps",
        "_get_per_token_logps_and_entropies",
        "beta",
        "importance_sampling_level",
        "loss_type",
        "epsilon_low",
        "epsilon_high",
    },
    "_calculate_rewards": {"reward_funcs"},
    "_prepare_inputs": {"_buffered_inputs", "_step"},
}

# Constants of a method: names of adapters, keys of the batch and keyword arguments of the fused forward
_CONSTANTS: dict[str, set[Any]] = {
    "__init__": {"default", "ref"},
    "_generate_and_score_completions": {
        "advantages",
        "completion_ids",
        "completion_mask",
        "num_items_in_batch",
        "old_per_token_logps",
        "ref_per_token_logps",
        "tool_mask",
        ADVANTAGE_EPS,
    },
    "_compute_loss": {
        "advantages",
        "old_per_token_logps",
        "ref_per_token_logps",
        "importance_sampling_ratio",
        "tool_mask",
        "policy_loss",
        "kl",
    },
    "_get_per_token_logps_and_entropies": {"labels", "fused_lm_head"},
}

# Called functions and their parameters
_FUNCTIONS = {
    "prepare_deepspeed": (prepare_deepspeed, ["model", "accelerator"]),
    "use_adapter": (use_adapter, ["model", "adapter_name"]),
    "SyncRefModelCallback": (SyncRefModelCallback, ["ref_model", "accelerator"]),
    "SyncRefModelCallback.sync_target_model": (
        SyncRefModelCallback.sync_target_model,
        ["model", "target_model", "alpha"],
    ),
}

# Variables of `add_fused_lm_head` that its patched forward closes over
_HEAD_VARIABLES = {
    "temperature": "temperature",
    "logit_scale": "logit_scale",
    "softcap": "final_logit_softcapping",
    "cast_to_fp32": "cast_lm_head_to_fp32",
}


class HeadSettings(NamedTuple):
    """How TRL turns hidden states into logits: `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`."""

    temperature: float
    logit_scale: float
    softcap: float | None
    cast_to_fp32: bool


def head_settings(forward: Any) -> HeadSettings:
    """What TRL's [`~trl.trainer.utils.add_fused_lm_head`] resolved for the model of this `forward`."""
    variables = inspect.getclosurevars(forward.__func__).nonlocals
    return HeadSettings(**{name: variables[upstream] for name, upstream in _HEAD_VARIABLES.items()})


def _constants(code: CodeType) -> set[Any]:
    """The constants of a function, with tuples (keyword names of calls) and inner functions opened."""
    found: set[Any] = set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _constants(constant)
        elif isinstance(constant, tuple):
            found |= set(constant)
        else:
            found.add(constant)
    return found


def _parameter_change(name: str, function: FunctionType, expected: list[Any]) -> str | None:
    found = list(inspect.signature(function).parameters)[1:]
    same = found[: len(expected) - 1] == expected[:-1] if expected[-1] is ... else found == expected
    return None if same else f"`GRPOTrainer.{name}` takes {found} where {expected} were expected"


def upstream_changes(trainer: type = GRPOTrainer) -> list[str]:
    """What differs in `trainer` from the TRL that this package was written against; empty when nothing does."""
    changes = []
    for name in sorted({*_PARAMETERS, *_ATTRIBUTES, *_CONSTANTS}):
        if name not in vars(trainer):
            changes.append(f"`GRPOTrainer.{name}` is gone")
            continue
        function = inspect.unwrap(vars(trainer)[name])
        if name in _PARAMETERS:
            changes.append(_parameter_change(name, function, _PARAMETERS[name]))
        for attribute in sorted(_ATTRIBUTES.get(name, set()) - set(function.__code__.co_names)):
            changes.append(f"`GRPOTrainer.{name}` no longer uses `{attribute}`")
        for constant in sorted(map(repr, _CONSTANTS.get(name, set()) - _constants(function.__code__))):
            changes.append(f"`GRPOTrainer.{name}` no longer uses {constant}")
    for name, (function, expected) in _FUNCTIONS.items():
        if (found := list(inspect.signature(function).parameters)) != expected:
            changes.append(f"`{name}` takes {found} where {expected} were expected")
    for variable in sorted(set(_HEAD_VARIABLES.values()) - set(add_fused_lm_head.__code__.co_cellvars)):
        changes.append(f"`add_fused_lm_head` no longer resolves `{variable}`")
    return [change for change in changes if change is not None]


def check_upstream(trainer: type = GRPOTrainer) -> None:
    """Raise `ImportError` naming what changed if `trainer` is not the one that this package extends."""
    if changes := upstream_changes(trainer):
        raise ImportError(
            f"trl_grpo_ext extends TRL 1.16 and TRL {trl.__version__} differs where it matters:\n- "
            + "\n- ".join(changes)
            + "\nInstall a matching version: `pip install 'trl>=1.16,<1.17'`."
        )


check_upstream()
