"""
Are the log-probs that are trained on those of the model's own logits? Asked of a few tokens, before the first update.

TRL computes log-probs from hidden states. It reads in the model's config how they become logits, and gives the model a
padded row without positions. Where this is not what the model does, then ratio, entropy and every KL are of another
distribution than the one that completions are sampled from.

The comparison is of the two log-probs of the same tokens:

- fused: as in training, from hidden states, with padding on the left;
- own: from `model(...).logits` of the tokens alone, divided by the temperature.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .._trl import FusedCausalLMOutput
from ..distributed import gather, total
from .model_forward import logits_of_last
from .reference import evaluation_mode


# Tokens at the end of the prompt, and as many at the beginning of the completion: their logits are all in memory
_TOKENS = 8
# More padding would not show more
_MOST_PADDING = 32
# Mean absolute difference of the log-probs, in nats, that rounding may cause
_ROUNDING = 1e-3
_ROUNDING_OF_HALVES = 1e-1
# What TRL hands to the model beside the ids: one number for each token, and what images are made of
_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
_IMAGE_INPUTS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "image_position_ids"),
)
# The fields of a config in which TRL looks for a scale and a soft cap of the logits
_KNOWN_FIELDS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class OwnLogits:
    """
    The comparison: at the first batch, and once more at the first one with padding if that had none.

    It is two forward passes of a few tokens, in evaluation mode and without gradient. All processes take part.

    Args:
        accelerator (`Accelerator`):
            To unwrap the model, and to add the differences of all processes.
        temperature (`float`):
            What logits are divided by.
        pad_id (`int`):
            A token to pad with.
    """

    def __init__(self, accelerator: Accelerator, temperature: float, pad_id: int):
        self._accelerator = accelerator
        self._temperature = temperature
        self._pad_id = pad_id
        # `None` before the first comparison
        self._compared_padding: int | None = None

    def check(self, model: Any, batch: Mapping[str, Any], score: Callable[..., Any]) -> None:
        """
        Raise `ValueError` if the log-probs are not those of the model's own logits, the first time it is called.

        Args:
            model (`nn.Module`):
                The policy.
            batch (`Mapping[str, Any]`):
                A batch as TRL scored it.
            score (`Callable`):
                TRL's `_get_per_token_logps_and_entropies`, which cuts the image inputs of a row out of the batch.
        """
        if self._compared_padding:
            return
        padding = int(gather(self._accelerator, most_padding(batch["prompt_mask"])).max())
        if padding == self._compared_padding:
            return
        self._compared_padding = padding
        language_model: Any = self._accelerator.unwrap_model(model)
        if isinstance(language_model, PeftModel):
            language_model = language_model.get_base_model()
        bound = rounding(model, self._accelerator.mixed_precision != "no", self._temperature)
        log_probs_T2 = self._compare(model, language_model, batch, score, padding)
        mean = self._mean_difference(log_probs_T2)
        if mean <= bound:
            return
        by_padding = False
        if padding:
            alone = self._mean_difference(self._compare(model, language_model, batch, score, 0))
            by_padding = alone <= bound
        cause = likely_cause(language_model.config, by_padding=by_padding)
        raise ValueError(explain_mismatch(log_probs_T2, mean, bound, cause, type(language_model).__name__))

    @torch.no_grad()
    def _compare(
        self, model: Any, language_model: Any, batch: Mapping[str, Any], score: Callable[..., Any], padding: int
    ) -> torch.Tensor:
        """Fused and own log-probs of a few tokens of this process, `(T, 2)`."""
        probe = probe_of(batch)
        compared = compared_forward(model, language_model, probe, self._temperature, padding, self._pad_id)
        rows = slice(probe.row + 1)
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[rows]
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[rows]
        tokens = {name: batch[name][rows] for name in _TOKEN_INPUTS if name in batch}
        images = {name: batch[name] for name in _IMAGE_INPUTS if name in batch}
        with evaluation_mode(model):
            log_probs, _, _ = score(compared, input_ids, mask, probe.num_scored, batch_size=1, **tokens, **images)
        return log_probs[-1]

    def _mean_difference(self, log_probs_T2: torch.Tensor) -> float:
        """Mean absolute difference of the log-probs of all processes, nats."""
        differences_T = (log_probs_T2[:, 0] - log_probs_T2[:, 1]).abs()
        sums = torch.stack([differences_T.sum(), torch.ones_like(differences_T).sum()])
        difference, tokens = total(self._accelerator, sums)
        return difference / max(tokens, 1.0)


class Probe(NamedTuple):
    """
    A few tokens of one row of a batch.

    Args:
        row (`int`):
            Which row: the first one with an image, if any has one.
        columns (`torch.Tensor`):
            Which of its tokens, padding left out: the last ones of the prompt, with an image all of it, and the first
            ones of the completion.
        num_scored (`int`):
            Of how many tokens at the end the log-probs are compared.
    """

    row: int
    columns: torch.Tensor
    num_scored: int


def probe_of(batch: Mapping[str, Any]) -> Probe:
    """
    The tokens of a scored batch to ask about.

    Args:
        batch (`Mapping[str, Any]`):
            A batch as TRL scored it.
    """
    with_images = [row for row, count in enumerate(batch.get("num_images") or []) if count]
    row = with_images[0] if with_images else 0
    in_prompt = batch["prompt_mask"][row].nonzero()[:, 0]
    in_completion = batch["completion_mask"][row].nonzero()[:, 0][:_TOKENS] + batch["prompt_mask"].size(1)
    if not with_images:
        in_prompt = in_prompt[-_TOKENS:]
    columns = torch.cat([in_prompt, in_completion])
    return Probe(row, columns, max(0, min(columns.numel(), 2 * _TOKENS) - 1))


def most_padding(prompt_mask: torch.Tensor) -> torch.Tensor:
    """Tokens of padding on the left of the row that has most, at most 32; a tensor with one number."""
    return (prompt_mask == 0).sum(1).max().clamp(max=_MOST_PADDING).reshape(1)


def compared_forward(
    model: Any, language_model: PreTrainedModel, probe: Probe, temperature: float, padding: int, pad_id: int
) -> Callable[..., Any]:
    """
    A forward for TRL to call on one row after the other, whose output holds fused and own log-probs of the probe.

    TRL cuts each row's image inputs out of the batch. It returns what is in `log_probs`, whatever the last dimension:
    `(1, T, 2)`, without meaning for the rows before the probe's.

    Args:
        model (`nn.Module`):
            The policy.
        language_model ([`~transformers.PreTrainedModel`]):
            The causal language model in it.
        probe ([`Probe`]):
            The tokens.
        temperature (`float`):
            What logits are divided by.
        padding (`int`):
            How many tokens of padding to put on the left for the fused log-probs.
        pad_id (`int`):
            Their id.
    """
    rows = iter(range(probe.row + 1))
    count = probe.num_scored

    def forward(*, labels: torch.Tensor, fused_lm_head: bool, **kwargs: Any) -> FusedCausalLMOutput:
        if next(rows) < probe.row:
            return FusedCausalLMOutput(log_probs=torch.zeros(1, count, 2, device=labels.device))
        names = [name for name in ("input_ids", "attention_mask", *_TOKEN_INPUTS) if name in kwargs]
        tokens = {name: kwargs.pop(name)[:, probe.columns] for name in names}
        ids = tokens["input_ids"]
        with logits_of_last(language_model, count + 1):
            logits = model(**tokens, **kwargs, use_cache=False).logits[:, :-1]
        own = chosen_log_probs(logits / temperature, ids[:, ids.size(1) - count :].to(logits.device))
        fill = {"input_ids": pad_id, "labels": -100}
        padded = {
            name: functional.pad(value, (padding, 0), value=fill.get(name, 0))
            for name, value in {**tokens, "labels": ids}.items()
        }
        fused = model(**padded, **kwargs, fused_lm_head=fused_lm_head).log_probs
        fused = fused[:, fused.size(1) - count :]
        return FusedCausalLMOutput(log_probs=torch.stack([fused, own.to(fused)], dim=-1))

    return forward


def chosen_log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`z[id] - log sum_v exp z[v]` of each token, in float32 or better: `(..., T)` from `(..., T, V)`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def rounding(model: nn.Module, is_autocast: bool, temperature: float) -> float:
    """
    Largest mean difference that rounding explains, nats.

    Args:
        model (`nn.Module`):
            The policy.
        is_autocast (`bool`):
            Whether it computes in half precision although its weights have more.
        temperature (`float`):
            What logits, and so their errors, are divided by.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    is_full = not is_autocast and dtypes <= {torch.float32, torch.float64}
    # With another setting, a GPU multiplies float32 in fewer digits
    is_full = is_full and torch.get_float32_matmul_precision() == "highest"
    return (_ROUNDING if is_full else _ROUNDING_OF_HALVES) / min(temperature, 1.0)


def explain_mismatch(log_probs_T2: torch.Tensor, mean: float, bound: float, cause: str, model_name: str) -> str:
    """
    What to say of log-probs that are not the model's.

    Args:
        log_probs_T2 (`torch.Tensor` of shape `(T, 2)`):
            Fused and own log-probs of this process's tokens, nats.
        mean (`float`):
            Mean absolute difference, over all processes, nats.
        bound (`float`):
            What rounding explains, nats.
        cause (`str`):
            What is likely the cause, and the way out, in sentences.
        model_name (`str`):
            The class of the model.
    """
    worst = ""
    if log_probs_T2.numel():
        differences_T = (log_probs_T2[:, 0] - log_probs_T2[:, 1]).abs()
        fused, own = log_probs_T2[int(differences_T.argmax())].tolist()
        worst = f" The largest: {fused:.4g} from hidden states, {own:.4g} from the model's own logits."
    return (
        f"The log-probs of {model_name} that would be trained on are not those of its own logits: they differ by "
        f"{mean:.3g} nats in the mean of a few tokens, where rounding explains {bound:.3g}.{worst} {cause} TRL's own "
        "log-probs have the same error, so that 'k1', 'k2' and 'k3' are no way out."
    )


def likely_cause(config: Any, *, by_padding: bool) -> str:
    """
    Why the log-probs may differ, and what to do.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Of the causal language model.
        by_padding (`bool`):
            Whether they only differ with padding on the left.
    """
    if by_padding:
        return (
            "Without padding on the left they agree: the model has absolute positions, for which TRL passes no "
            "position_ids (as GPT-2), or a state that padding enters. Use prompts of one length, or a model with "
            "rotary positions."
        )
    text_config = config.get_text_config()
    fields = {name: value for name, value in text_config.to_dict().items() if _is_number(value)}
    known = {name: fields[name] for name in _KNOWN_FIELDS if name in fields and fields[name] != 1}
    if known:
        neutral = " and ".join(f"{name}={None if 'softcap' in name else 1.0}" for name in known)
        return (
            f"TRL scales or caps the logits by the text config's {_listed(known)}, which this model's forward seems "
            f"not to do. Set {neutral} in model.config.get_text_config(), and pass the model."
        )
    if others := {name: value for name, value in fields.items() if _acts_on_logits(name)}:
        return (
            f"TRL does not know the text config's {_listed(others)}. If it caps the logits, set "
            "final_logit_softcapping to it in model.config.get_text_config(), and if it is a factor, logit_scale; and "
            "pass the model."
        )
    return (
        "The model has layers between its backbone and its LM head, as ModernBertDecoder has, which TRL leaves out "
        "and never trains, or it changes its logits in a way that TRL does not know. Use another model."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _acts_on_logits(name: str) -> bool:
    return "logit" in name and name not in _KNOWN_FIELDS and not re.search("attn|attention|router|clip", name)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
