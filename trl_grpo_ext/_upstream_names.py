"""
The names of TRL that this package overrides, calls, reads or sets, checked once at import.

TRL's underscore methods are not a public API, so a TRL that lacks one of these names stops the import, instead of
training something else. Of transformers, accelerate and peft, the names are checked that their documentation does not
promise. The tests collect the names that the package uses, and compare them with these tables.

The check sees that a name is there, not what is done with it: see [`~trl_grpo_ext._upstream_sources`] for that.

Methods and functions are written as `module:qualified_name`.
"""

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterable
from importlib.metadata import version
from itertools import chain
from types import CodeType
from typing import Any


# What `pip install` has to find, and the way out of every error
SUPPORTED_TRL = "trl>=1.16,<1.17"

# The constant that TRL adds to the standard deviation of rewards
ADVANTAGE_EPS = 1e-4

_TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer"
_CALLBACK = "trl.trainer.callbacks:SyncRefModelCallback"
_UTILS = "trl.trainer.utils"

# Methods and functions that are overridden or called, and their parameters; `...` marks that more may follow
_PARAMETERS: dict[str, list[Any]] = {
    f"{_TRAINER}.__init__": [
        *("self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
        *("reward_processing_classes", "callbacks", "optimizers", "quantization_config", "peft_config", "tools"),
        *("rollout_func", "environment_factory"),
    ],
    f"{_TRAINER}._tokenize_prompts": ["self", "prompts"],
    f"{_TRAINER}._generate": ["self", "prompts"],
    f"{_TRAINER}._calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    f"{_TRAINER}._generate_and_score_completions": ["self", "inputs"],
    f"{_TRAINER}._get_per_token_logps_and_entropies": [
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
        ...,
    ],
    f"{_TRAINER}._compute_loss": ["self", "model", "inputs"],
    f"{_TRAINER}._prepare_inputs": ["self", "generation_batch"],
    f"{_TRAINER}._save_checkpoint": ["self", "model", "trial"],
    f"{_TRAINER}._get_train_sampler": ["self", "dataset"],
    f"{_TRAINER}.log": ["self", "logs", "start_time"],
    "trl.trainer.base_trainer:_BaseTrainer.create_model_card": ["self", "model_name", "dataset_name", "tags"],
    _CALLBACK: ["ref_model", "accelerator"],
    f"{_CALLBACK}.sync_target_model": ["model", "target_model", "alpha"],
    f"{_UTILS}:add_fused_lm_head": ["model", ...],
    f"{_UTILS}:get_config_model_id": ["config"],
    f"{_UTILS}:is_async_callable": ["func"],
    f"{_UTILS}:maybe_gather_lm_head_ctx": ["params"],
    f"{_UTILS}:use_adapter": ["model", "adapter_name"],
    "trl.models.utils:prepare_deepspeed": ["model", "accelerator"],
    "transformers:Trainer._finalize_training": ["self", "trial", ...],
    "transformers:Trainer._init_training_state": ["self", ...],
    "transformers:Trainer._load_best_model": ["self"],
    "transformers:Trainer._load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}

# Attributes that a method has to read or set: those that this package reads, and those that it sets for TRL to read
_ATTRIBUTES = {
    f"{_TRAINER}.__init__": {
        *("accelerator", "add_callback", "args", "is_deepspeed_enabled", "is_fsdp_enabled", "model"),
        *(
            "ref_model",
            "reward_funcs",
            "reward_func_names",
            "reward_weights",
            "scale_rewards",
            "multi_objective_aggregation",
        ),
        *("num_generations", "num_generations_eval", "num_iterations", "max_completion_length", "rollout_func"),
        *("loss_type", "beta", "importance_sampling_level", "epsilon_low", "epsilon_high"),
        *("aux_loss_enabled", "router_aux_loss_coef", "_entropy_bonus_enabled"),
        *("_buffered_inputs", "_is_vlm", "_logs", "_metrics", "_step", "_tokenizer"),
    },
    f"{_TRAINER}._generate_and_score_completions": {
        *("_calculate_rewards", "_get_per_token_logps_and_entropies", "_logs", "_metrics", "beta", "ref_model"),
    },
    f"{_TRAINER}._compute_loss": {
        *("current_gradient_accumulation_steps", "_get_per_token_logps_and_entropies", "beta", "loss_type"),
        *("importance_sampling_level", "epsilon_low", "epsilon_high"),
    },
    f"{_TRAINER}._calculate_rewards": {"reward_funcs", "reward_func_names"},
    f"{_TRAINER}._prepare_inputs": {"_generate_and_score_completions", "_buffered_inputs", "_step"},
    f"{_TRAINER}._save_checkpoint": {"state"},
    f"{_TRAINER}.log": {"_logs", "_metrics", "log_completions", "num_completions_to_print"},
    f"{_TRAINER}.training_step": {"_step"},
    f"{_CALLBACK}.on_step_end": {"sync_target_model", "ref_model_sync_steps", "ref_model_mixup_alpha"},
    # Its settings are others while ours saves
    "transformers:Trainer._save_checkpoint": {"push_to_hub", "save_total_limit"},
}

# Constants of a method: names of adapters, keys of the batch and keyword arguments of the fused forward
_CONSTANTS: dict[str, set[Any]] = {
    f"{_TRAINER}.__init__": {"default", "ref"},
    f"{_TRAINER}._generate_and_score_completions": {
        *("advantages", "completion_ids", "completion_mask", "importance_sampling_ratio", "num_items_in_batch"),
        *("old_per_token_logps", "ref_per_token_logps", "tool_mask"),
        *("prompt_ids", "prompt_mask", "sampling_per_token_logps"),
        *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
        *("image_sizes", "image_position_ids", "token_type_ids", "mm_token_type_ids"),
        ADVANTAGE_EPS,
    },
    f"{_TRAINER}._compute_loss": {
        *("advantages", "completion_ids", "completion_mask", "importance_sampling_ratio", "num_items_in_batch"),
        *("old_per_token_logps", "ref_per_token_logps", "tool_mask"),
        *("policy_loss", "kl"),
    },
    f"{_TRAINER}._get_per_token_logps_and_entropies": {"labels", "fused_lm_head", "output_router_logits"},
}

# Fields of TRL's dataclasses
_FIELDS = {
    "trl.trainer.grpo_config:GRPOConfig": {
        *("beta", "bf16", "cast_lm_head_to_fp32", "disable_tqdm", "fp16", "generation_kwargs"),
        *("gradient_checkpointing", "neftune_noise_alpha", "report_to"),
        *("gradient_accumulation_steps", "gradient_checkpointing_kwargs", "hub_model_id"),
        *("importance_sampling_level", "logging_first_step", "logging_strategy", "loss_type"),
        *("mask_truncated_completions", "max_completion_length", "min_p", "model_init_kwargs"),
        *("multi_objective_aggregation", "num_generations", "num_iterations", "off_policy_mask_threshold"),
        *("output_dir", "per_device_train_batch_size", "push_to_hub", "ref_model_mixup_alpha"),
        *("ref_model_sync_steps", "repetition_penalty", "reward_weights", "save_total_limit", "scale_rewards"),
        *("steps_per_generation", "sync_ref_model", "temperature", "top_k", "top_p", "trust_remote_code"),
        *("use_bias_correction_kl", "use_vllm"),
    },
    f"{_UTILS}:FusedCausalLMOutput": {"log_probs", "entropy", "label_mask", "aux_loss"},
}

# Variables of `add_fused_lm_head` that its patched forward closes over, by their names in [`HeadSettings`]
HEAD_VARIABLES = {
    "temperature": "temperature",
    "logit_scale": "logit_scale",
    "softcap": "final_logit_softcapping",
    "cast_to_fp32": "cast_lm_head_to_fp32",
}
# ... and the one that holds the forward that it patches
PLAIN_FORWARD_VARIABLE = "original_forward"

# Other names of TRL, transformers, accelerate and peft that they do not document, by the file that uses them
PRIVATE_NAMES = {
    "cli.py": [
        "accelerate.commands.launch:launch_command",
        "accelerate.commands.launch:launch_command_parser",
        "trl.cli.accelerate_config:resolve_accelerate_config_argument",
        "trl.scripts.grpo:main",
        "trl.scripts.grpo:make_parser",
        "trl.scripts.utils:TrlParser",
    ],
    "checkpoints/folders.py": [
        "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR",
        "transformers.trainer_utils:sort_checkpoints",
    ],
    "checkpoints/manifest.py": ["transformers.trainer:TRAINER_STATE_NAME"],
    "checkpoints/trainer.py": [
        "transformers:Trainer._get_output_dir",
        "transformers:Trainer._push_from_checkpoint",
        "transformers.trainer:TRAINING_ARGS_NAME",
    ],
    "checkpoints/weights.py": [
        "transformers.conversion_mapping:get_model_conversion_mapping",
        "transformers.utils:SAFE_WEIGHTS_INDEX_NAME",
        "transformers.utils:SAFE_WEIGHTS_NAME",
    ],
    "kl/model_forward.py": ["peft.utils:ModulesToSaveWrapper"],
    "kl/supported.py": ["peft.utils:TrainableTokensWrapper"],
    "reward_models/checkpoint.py": [
        "peft.utils.save_and_load:load_peft_weights",
        "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
        "transformers.integrations.deepspeed:set_hf_deepspeed_config",
        "transformers.integrations.deepspeed:unset_hf_deepspeed_config",
        "transformers.utils.peft_utils:find_adapter_config_file",
    ],
    "reward_models/heads.py": ["transformers.activations:ACT2FN"],
    "trainer.py": [f"{_TRAINER}._tag_names"],
}


def mismatch(changes: Iterable[str]) -> str:
    """The message of the error that stops the import, with one line for each of `changes`."""
    return (
        f"trl_grpo_ext extends TRL 1.16, and TRL {version('trl')} with transformers {version('transformers')} and "
        f"peft {version('peft')} differs where it matters:\n- "
        + "\n- ".join(changes)
        + f"\nInstall a matching version: `pip install '{SUPPORTED_TRL}'`."
    )


def check_names() -> None:
    """Raise `ImportError` naming every name that is missing."""
    if changes := changed_names():
        raise ImportError(mismatch(changes))


def changed_names() -> list[str]:
    """What differs from the TRL that this package was written against; empty when nothing does."""
    read = {*_PARAMETERS, *_ATTRIBUTES, *_CONSTANTS, *_FIELDS, *chain(*PRIVATE_NAMES.values())}
    changes = [f"`{_short(name)}` is gone" for name in sorted(read) if not _exists(name)]
    if changes:
        return changes
    for name, parameters in _PARAMETERS.items():
        changes += _changed_parameters(name, parameters)
    for name, attributes in _ATTRIBUTES.items():
        missing = attributes - set(_code(name).co_names)
        changes += [f"`{_short(name)}` no longer uses `{attribute}`" for attribute in sorted(missing)]
    for name, constants in _CONSTANTS.items():
        missing = constants - _constants(_code(name))
        changes += [f"`{_short(name)}` no longer uses {constant}" for constant in sorted(map(repr, missing))]
    for name, fields in _FIELDS.items():
        missing = fields - {field.name for field in dataclasses.fields(pkgutil.resolve_name(name))}
        changes += [f"`{_short(name)}` no longer has the field `{field}`" for field in sorted(missing)]
    resolved = set(_code(f"{_UTILS}:add_fused_lm_head").co_cellvars)
    missing = {*HEAD_VARIABLES.values(), PLAIN_FORWARD_VARIABLE} - resolved
    return changes + [f"`add_fused_lm_head` no longer resolves `{variable}`" for variable in sorted(missing)]


def _short(name: str) -> str:
    return name.partition(":")[2]


def _exists(name: str) -> bool:
    owner, _, method = name.rpartition(".")
    try:
        # A method that TRL no longer overrides would be found in a base class
        if "." in _short(name):
            return method in vars(pkgutil.resolve_name(owner))
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _code(name: str) -> CodeType:
    return inspect.unwrap(pkgutil.resolve_name(name)).__code__


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


def _changed_parameters(name: str, expected: list[Any]) -> list[str]:
    found = list(inspect.signature(pkgutil.resolve_name(name)).parameters)
    same = found[: len(expected) - 1] == expected[:-1] if expected[-1] is ... else found == expected
    return [] if same else [f"`{_short(name)}` takes {found} where {expected} were expected"]
