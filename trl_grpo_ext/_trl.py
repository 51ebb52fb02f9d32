"""
The one door to TRL: what this package uses of it is imported here, and checked once at import.

- A name that is missing stops the import with an `ImportError` that says which: see
  [`~trl_grpo_ext._upstream_names`].
- A method whose source is another than in the version that was compared is a warning that says which, and which files
  of this package mirror it: see [`~trl_grpo_ext._upstream_sources`].
"""

import inspect
from typing import Any, NamedTuple

from ._upstream_names import ADVANTAGE_EPS, HEAD_VARIABLES, changed_names, check_names, mismatch
from ._upstream_sources import warn_of_changed_sources


try:
    from trl.models.utils import prepare_deepspeed
    from trl.trainer.callbacks import SyncRefModelCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import (
        FusedCausalLMOutput,
        get_config_model_id,
        is_async_callable,
        maybe_gather_lm_head_ctx,
        use_adapter,
    )
except ImportError as error:
    # What is missing elsewhere, in a package that TRL imports, its own message says best
    if not (error.name or "").startswith("trl."):
        raise
    raise ImportError(mismatch(changed_names())) from error


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

check_names()
warn_of_changed_sources()


class HeadSettings(NamedTuple):
    """
    How TRL turns hidden states `h` into logits, with the LM head's weight `W` and bias `b`.

        logits = softcap * tanh(logit_scale * (W h + b) / softcap) / temperature

    Without `softcap`:

        logits = logit_scale * (W h + b) / temperature

    Args:
        temperature (`float`):
            Temperature of the policy.
        logit_scale (`float`):
            The model's own factor.
        softcap (`float` or `None`):
            Bound on the absolute value of the scaled logits.
        cast_to_fp32 (`bool`):
            Whether the head runs in float32.
    """

    temperature: float
    logit_scale: float
    softcap: float | None
    cast_to_fp32: bool


def head_settings(forward: Any) -> HeadSettings:
    """
    What TRL's [`~trl.trainer.utils.add_fused_lm_head`] resolved for a model.

    Args:
        forward (`Callable`):
            The model's bound `forward`, as TRL has patched it.
    """
    variables = inspect.getclosurevars(forward.__func__).nonlocals
    return HeadSettings(**{name: variables[upstream] for name, upstream in HEAD_VARIABLES.items()})
