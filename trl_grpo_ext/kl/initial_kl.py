"""Is the policy the reference before the first update? If not, why, and whether that can be meant."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .reference import REFERENCE_ADAPTER


# Mean KL per token, in nats, that rounding may cause: the two models run the same operations on the same weights
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5}
_ROUNDING_OF_HALVES = 1e-3


def tolerance(dtype: torch.dtype) -> float:
    """Largest mean KL per token between equal models that compute in `dtype`, nats."""
    return _ROUNDING.get(dtype, _ROUNDING_OF_HALVES)


def randomness(model: nn.Module, config: Any, neftune_noise_alpha: float | None) -> list[str]:
    """What makes two forward passes in training mode differ: fields of the model's config, dropout layers, noise."""
    fields = config.get_text_config().to_dict()
    found = [
        f"{name}={value}"
        for name, value in fields.items()
        if ("dropout" in name or "pdrop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    ]
    layers = sorted({f"Dropout({m.p})" for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0})
    noise = [f"neftune_noise_alpha={neftune_noise_alpha}"] if neftune_noise_alpha else []
    return found + layers + noise


def explain_difference(
    kl: float, model: nn.Module, config: Any, *, from_path: bool, neftune_noise_alpha: float | None = None
) -> tuple[str, bool]:
    """
    What to say of a policy that differs from the reference before the first update.

    Args:
        kl (`float`):
            Mean KL per token, nats.
        model (`nn.Module`):
            The policy, unwrapped.
        config (`Any`):
            Its config.
        from_path (`bool`):
            Whether policy and reference were loaded from the same place by the trainer.
        neftune_noise_alpha (`float`, *optional*):
            The noise that transformers adds to the policy's embeddings.

    Returns:
        `tuple[str, bool]`: the message, and whether the difference is certainly a mistake.
    """
    message = f"Before the first update the KL to the reference is {kl:.3g} nats per token instead of 0."
    random = randomness(model, config, neftune_noise_alpha)
    if random:
        return (
            f"{message} The policy's forward pass is random ({', '.join(random)}); `disable_dropout=True` reaches "
            "`nn.Dropout` layers only; other dropout is set to 0 in the model's config.",
            False,
        )
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return f"{message} The reference is the model without the learned prompt.", False
        if REFERENCE_ADAPTER in model.peft_config:
            return (
                f"{message} The reference is a copy of the adapter as it was when the trainer was built, and the "
                "weights have changed since, as by another trainer of the same model.",
                False,
            )
        return (
            f"{message} The reference is the model without its adapter, and the adapter does not start at zero (such "
            "as with init_lora_weights=False, or FourierFT). Pass the model with its adapter, `get_peft_model(model, "
            "peft_config)`, whose reference is a frozen copy of the adapter; or use an initialisation that starts at "
            "zero.",
            True,
        )
    return (
        f"{message} The reference is loaded anew from '{config.name_or_path}', and the model that was passed has "
        "other weights, such as those of an adapter that was merged in memory. Save the model, and pass its folder.",
        from_path,
    )
