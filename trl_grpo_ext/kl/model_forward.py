"""
The model forward that returns the exact KL beside TRL's log-probs and entropy.

TRL asks the wrapped model for log-probs, `model(..., labels=..., fused_lm_head=True)`. The exact KL is computed in
that same call, from the same backbone pass, so that DDP, FSDP and DeepSpeed see one forward and one backward.
"""

import functools
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .._trl import FusedCausalLMOutput, HeadSettings, maybe_gather_lm_head_ctx
from ..loss import ExpectedLoss
from .fused.token_stats import fused_token_stats_for_loss


@dataclass
class ExactKLOutput(FusedCausalLMOutput):
    """
    TRL's fused output for the T completion tokens, and what the exact KL adds.

    Args:
        kl (`torch.Tensor` of shape `(B, T)`):
            KL of the policy to the reference over the vocabulary, in nats.
        ref_log_probs (`torch.Tensor` of shape `(B, T)`):
            Reference log-prob of each token, without gradient.
        hidden_states (`torch.Tensor` of shape `(B, L - 1, H)`):
            Last hidden states of the positions that predict a token; only of a pass that keeps them, whose
            `log_probs` are NaN since no head was run.
    """

    kl: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


def add_exact_kl(
    model: PreTrainedModel, settings: HeadSettings, reference_head: weakref.ref[nn.Linear], memory: int
) -> None:
    """
    Let `model`, which TRL gave a fused head, take part in the exact KL.

    `model(..., labels=..., keep_hidden_states=True)` is a pass of the reference and runs the backbone only.
    `model(..., labels=..., ref_hidden_states=..., expected_loss=...)` is a pass of the policy and returns
    [`ExactKLOutput`]. Any other call is the model's own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal language model under any PEFT, DDP, FSDP or DeepSpeed wrapper.
        settings (`HeadSettings`):
            How hidden states become logits, as TRL resolved it.
        reference_head (`weakref.ref` of `nn.Linear`):
            The reference's LM head; weak, since the model outlives the trainer.
        memory (`int`):
            Bytes for tiles of logits.
    """
    forward = model.forward

    # Keeps the signature, against which `generate` checks its arguments
    @functools.wraps(type(model).forward)
    def exact_kl_forward(self, *args, keep_hidden_states=False, ref_hidden_states=None, expected_loss=None, **kwargs):
        if not keep_hidden_states and ref_hidden_states is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs.pop("fused_lm_head")
        outputs = self.base_model(*args, use_cache=False, **kwargs)
        hidden_states = outputs.last_hidden_state[:, :-1]
        if keep_hidden_states:
            return ExactKLOutput(
                log_probs=hidden_states.new_full(labels.shape, torch.nan), hidden_states=hidden_states
            )
        ref_BTH = cast(torch.Tensor, ref_hidden_states)
        tokens = slice(-ref_BTH.size(1), None)
        output = _token_stats(
            hidden_states[:, tokens],
            leaf_head(self),
            labels[:, tokens],
            ref_BTH,
            cast(nn.Linear, reference_head()),
            settings,
            memory,
            expected_loss,
        )
        if kwargs.get("output_router_logits"):
            text_config = self.config.get_text_config()
            output.aux_loss = cast(
                torch.Tensor,
                load_balancing_loss_func(
                    outputs.router_logits,
                    text_config.num_experts,
                    text_config.num_experts_per_tok,
                    kwargs.get("attention_mask"),
                ),
            )
        return output

    model.forward = types.MethodType(exact_kl_forward, model)


def leaf_head(model: PreTrainedModel) -> nn.Linear:
    """The LM head that is active now: PEFT keeps a trained copy beside the original one in `modules_to_save`."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    return cast(nn.Linear, head)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    # A module that FSDP2 wraps by itself, as it is done with trained modules under PEFT, keeps its parameters sharded
    # outside its own forward. Each process then has the gradient of its own tokens, and nothing else averages them
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


class _Head(NamedTuple):
    """Weight and bias of an LM head, whole."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> "_Head":
        return cls(_whole(module.weight), None if module.bias is None else _whole(module.bias))


def _token_stats(
    hidden_BTH: torch.Tensor,
    head: nn.Linear,
    labels_BT: torch.Tensor,
    ref_hidden_BTH: torch.Tensor,
    ref_head: nn.Linear,
    settings: HeadSettings,
    memory: int,
    expected_loss: ExpectedLoss | None,
) -> ExactKLOutput:
    """Run the fused head on the labelled tokens only, and put its statistics back in place."""
    own = _Head.of(head)
    other = None if ref_head is head else _Head.of(ref_head)
    # With a model split over devices, the head can live on another one than the backbone's end
    device = own.weight.device
    labels_BT = labels_BT.to(device)
    mask_BT = labels_BT != -100
    hidden_NH, ref_hidden_NH = hidden_BTH.to(device)[mask_BT], ref_hidden_BTH.to(device)[mask_BT]
    context: Any = nullcontext()
    if settings.cast_to_fp32:
        hidden_NH, ref_hidden_NH = hidden_NH.float(), ref_hidden_NH.float()
        context = torch.autocast(device.type, enabled=False)
    heads = [own.weight, own.bias] + ([] if other is None else [other.weight, other.bias])
    with context, maybe_gather_lm_head_ctx(*heads):
        stats = fused_token_stats_for_loss(
            hidden_NH,
            own.weight,
            labels_BT[mask_BT],
            ref_hidden_NH,
            None if other is None else other.weight.to(device),
            bias=own.bias,
            ref_bias=None if other is None else other.bias,
            temperature=settings.temperature,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
            logits_memory=memory,
            expected=None if expected_loss is None else expected_loss.at(mask_BT),
            gathered=maybe_gather_lm_head_ctx,
        )
    logp, entropy, kl, ref_logp = (x.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x) for x in stats)
    return ExactKLOutput(log_probs=logp, entropy=entropy, label_mask=mask_BT, kl=kl, ref_log_probs=ref_logp)


class ModelCall:
    """
    A model as TRL calls it, with keyword arguments added to each call and each output shown to `on_output`.

    TRL's loss and its reference pass take a `model` argument and do nothing with it but call it, so this is how more
    goes in and comes out without touching their bodies.
    """

    def __init__(self, model: Callable[..., Any], on_output: Callable[[Any], None], **extra: Any):
        self.model = model
        self.on_output = on_output
        self.extra = extra

    def __call__(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs, **self.extra)
        self.on_output(output)
        return output
