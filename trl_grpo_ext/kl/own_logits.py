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
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .._trl import FusedCausalLMOutput
from ..distributed import gather, total
from .cached_reference import causal_language_model
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

# From the inputs with one number for each token, the other ones, and T, to log-probs `(1, T)` of the last T tokens
LogProbs = Callable[[dict[str, torch.Tensor], dict[str, Any], int], torch.Tensor]


class OwnLogits:
    """
    The comparison: at the first batch, and once more at the first one with padding if that had none.

    It takes two forward passes of a few tokens, in evaluation mode and without gradient. All processes take part.

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
        language_model = causal_language_model(cast(nn.Module, self._accelerator.unwrap_model(model)))
        bound = rounding(model, self._accelerator.mixed_precision != "no", self._temperature)
        probe = probe_of(batch)

        def run(log_probs: LogProbs) -> torch.Tensor:
            with torch.no_grad(), evaluation_mode(model):
                return score_row(batch, probe, score, log_probs)

        # In this order: DeepSpeed records the order of modules in a pass, and one that goes on after the same
        # beginning makes it record anew, where one that ends sooner does not
        fused_T = run(fused_log_probs(model, padding, self._pad_id))
        own_T = run(own_log_probs(model, language_model, self._temperature)).to(fused_T)
        mean = self._mean_difference(fused_T, own_T)
        if mean <= bound:
            return
        by_padding = False
        if padding:
            alone_T = run(fused_log_probs(model, 0, self._pad_id))
            by_padding = self._mean_difference(alone_T, own_T) <= bound
        cause = likely_cause(language_model.config, by_padding=by_padding)
        raise ValueError(explain_mismatch(fused_T, own_T, mean, bound, cause, type(language_model).__name__))

    def _mean_difference(self, fused_T: torch.Tensor, own_T: torch.Tensor) -> float:
        """Mean absolute difference of the log-probs of all processes, nats."""
        differences_T = (fused_T - own_T).abs()
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


def score_row(batch: Mapping[str, Any], probe: Probe, score: Callable[..., Any], log_probs: LogProbs) -> torch.Tensor:
    """
    Log-probs of the probe's tokens, `(T,)`.

    TRL cuts the batch into rows, the image inputs too, and calls a forward on one after the other. Of the rows before
    the probe's nothing is computed.

    Args:
        batch (`Mapping[str, Any]`):
            A batch as TRL scored it.
        probe ([`Probe`]):
            The tokens.
        score (`Callable`):
            TRL's `_get_per_token_logps_and_entropies`.
        log_probs (`LogProbs`):
            From the probe's inputs to the log-probs `(1, T)` of its last T tokens.
    """
    rows = iter(range(probe.row + 1))
    count = probe.num_scored

    def forward(*, labels: torch.Tensor, fused_lm_head: bool, **kwargs: Any) -> FusedCausalLMOutput:
        if next(rows) < probe.row:
            return FusedCausalLMOutput(log_probs=torch.zeros(1, count, device=labels.device))
        names = [name for name in ("input_ids", "attention_mask", *_TOKEN_INPUTS) if name in kwargs]
        tokens = {name: kwargs.pop(name)[:, probe.columns] for name in names}
        return FusedCausalLMOutput(log_probs=log_probs(tokens, kwargs, count))

    rows_before = slice(probe.row + 1)
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[rows_before]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[rows_before]
    tokens = {name: batch[name][rows_before] for name in _TOKEN_INPUTS if name in batch}
    images = {name: batch[name] for name in _IMAGE_INPUTS if name in batch}
    return score(forward, input_ids, mask, count, batch_size=1, **tokens, **images)[0][-1]


def fused_log_probs(model: Any, padding: int, pad_id: int) -> LogProbs:
    """
    Those that TRL computes from hidden states.

    Args:
        model (`nn.Module`):
            The policy.
        padding (`int`):
            How many tokens of padding to put on the left.
        pad_id (`int`):
            Their id.
    """
    fill = {"input_ids": pad_id, "labels": -100}

    def run(tokens: dict[str, torch.Tensor], others: dict[str, Any], count: int) -> torch.Tensor:
        padded = {
            name: functional.pad(value, (padding, 0), value=fill.get(name, 0))
            for name, value in {**tokens, "labels": tokens["input_ids"]}.items()
        }
        log_probs = model(**padded, **others, fused_lm_head=True).log_probs
        return log_probs[:, log_probs.size(1) - count :]

    return run


def own_log_probs(model: Any, language_model: PreTrainedModel, temperature: float) -> LogProbs:
    """
    Those of the model's own logits `z`, `log softmax(z / temperature)`.

    Args:
        model (`nn.Module`):
            The policy.
        language_model ([`~transformers.PreTrainedModel`]):
            The causal language model in it.
        temperature (`float`):
            What logits are divided by.
    """

    def run(tokens: dict[str, torch.Tensor], others: dict[str, Any], count: int) -> torch.Tensor:
        ids = tokens["input_ids"]
        with logits_of_last(language_model, count + 1):
            logits = model(**tokens, **others, use_cache=False).logits[:, :-1]
        return chosen_log_probs(logits / temperature, ids[:, ids.size(1) - count :].to(logits.device))

    return run


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


def explain_mismatch(
    fused_T: torch.Tensor, own_T: torch.Tensor, mean: float, bound: float, cause: str, model_name: str
) -> str:
    """
    What to say of log-probs that are not the model's.

    Args:
        fused_T, own_T (`torch.Tensor` of shape `(T,)`):
            The two log-probs of this process's tokens, nats.
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
    if fused_T.numel():
        token = int((fused_T - own_T).abs().argmax())
        both = f"{fused_T[token]:.4g} from hidden states, {own_T[token]:.4g} from the model's own logits"
        worst = f" The largest difference: {both}."
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
