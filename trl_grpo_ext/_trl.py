"""
The one door to TRL: what this package uses of it is imported here, and checked once at import.

- A name that is missing stops the import with an `ImportError` that says which: see
  [`~trl_grpo_ext._upstream_names`].
- A method whose source is another than in the version that was compared is a warning that says which, and which files
  of this package mirror it: see [`~trl_grpo_ext._upstream_sources`].
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from ._upstream_names import (
    ADVANTAGE_EPS,
    HEAD_VARIABLES,
    PLAIN_FORWARD_VARIABLE,
    changed_names,
    check_names,
    mismatch,
)
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
    "let_copies_compute",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "unbound_forward",
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


def let_copies_compute(model: Any) -> None:
    """
    Let a copy of a model that TRL gave a fused head compute with its own weights.

    TRL's forward calls the model's plain forward bound to the model. A copy, such as `copy.deepcopy` makes it for a
    moving average, would compute with the weights of the original.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal language model, as TRL has patched it.
    """
    fused = model.forward.__func__
    plain = unbound_forward(model, inspect.getclosurevars(fused).nonlocals[PLAIN_FORWARD_VARIABLE])

    # Keeps the signature, against which `generate` checks its arguments
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        return plain(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def unbound_forward(model: Any, forward: Any) -> Callable[..., Any]:
    """
    The function behind a model's forward, which takes the model, or a copy of it, as its first argument.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        forward (`Callable`):
            Its `forward`, now or before a patch.
    """
    if isinstance(forward, MethodType):
        return forward.__func__
    # The hooks of accelerate, as of a model that is split over devices
    if isinstance(forward, functools.partial) and forward.args == (model,):
        return forward.func
    # Someone's own function, which knows its model
    return lambda self, *args, **kwargs: forward(*args, **kwargs)
