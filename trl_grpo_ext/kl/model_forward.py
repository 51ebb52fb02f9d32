"""
The model forward that returns the exact KL beside TRL's log-probs and entropy.

TRL asks the wrapped model for log-probs:

    model(..., labels=labels, fused_lm_head=True)

The exact KL is computed in that same call, from the same backbone pass. DDP, FSDP and DeepSpeed then see one forward
and one backward.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from .._trl import FusedCausalLMOutput, HeadSettings, maybe_gather_lm_head_ctx, unbound_forward
from ..loss import ClippedLossGradient
from .fused.predicted_gradient import SecondPassCount
from .fused.token_stats import fused_token_stats_for_loss


@dataclass
class ExactKLOutput(FusedCausalLMOutput):
    """
    TRL's fused output for the T completion tokens, and what the exact KL adds.

    Args:
        kl (`torch.Tensor` of shape `(B, T)`):
            Divergence of policy and reference over the vocabulary, in nats.
        ref_log_probs (`torch.Tensor` of shape `(B, T)`):
            Reference log-prob of each token, without gradient.
    """

    kl: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None


@dataclass
class ExactKLHead:
    """
    What turns the hidden states of policy and reference into the exact KL.

    Args:
        settings (`HeadSettings`):
            How hidden states become logits, as TRL resolved it.
        logits_memory_bytes (`int` or `None`):
            Bytes that logits may take at one moment.
        direction (`str`):
            A key of [`~trl_grpo_ext.kl.divergences.DIVERGENCES`].
        second_pass ([`~trl_grpo_ext.kl.fused.predicted_gradient.SecondPassCount`]):
            Counts the tokens that go through the policy's head a second time.
        reference_head (`weakref.ref` of `nn.Linear`, *optional*):
            The LM head of the reference in use.
    """

    settings: HeadSettings
    logits_memory_bytes: int | None
    direction: str
    second_pass: SecondPassCount
    # Weak, since the patched policy outlives the trainer
    reference_head: weakref.ref[nn.Linear] | None = None


def add_exact_kl(model: PreTrainedModel) -> None:
    """
    Let `model`, which TRL gave a fused head, take part in the exact KL.

    Two calls of the model are new; any other call is passed on to the model's own forward.

    - `model(..., labels=..., return_hidden_states=True)` is a pass of the reference. It runs the backbone only, and
      its output has the last hidden states `(B, L - 1, H)` of the positions that predict a token in place of the
      log-probs.
    - `model(..., labels=..., ref_hidden_states=..., kl_head=..., predicted_gradient=...)` is a pass of the policy and
      returns [`ExactKLOutput`]. `ref_hidden_states` `(B, T, H)` are the reference's, of the last T tokens. `kl_head`
      is the [`ExactKLHead`] of the trainer that calls, since several may share the model. `predicted_gradient` is a
      [`~trl_grpo_ext.loss.ClippedLossGradient`] or `None`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal language model under any PEFT, DDP, FSDP or DeepSpeed wrapper.
    """
    forward = unbound_forward(model, model.forward)
    has_routers = "output_router_logits" in model.config.get_text_config().to_dict()

    # Keeps the signature, against which `generate` checks its arguments
    @functools.wraps(type(model).forward)
    def exact_kl_forward(
        self,
        *args,
        return_hidden_states=False,
        ref_hidden_states=None,
        kl_head=None,
        predicted_gradient=None,
        **kwargs,
    ):
        if not return_hidden_states and ref_hidden_states is None:
            if has_routers and kwargs.get("fused_lm_head"):
                # TRL cannot make the routers' loss of all families, and where it did not ask for it does not need it
                kwargs.setdefault("output_router_logits", False)
            return forward(self, *args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs.pop("fused_lm_head")
        backbone = _run_backbone(self, forward, *args, **kwargs)
        hidden_states = backbone.hidden_states[:, :-1]
        if return_hidden_states:
            return ExactKLOutput(log_probs=hidden_states)
        ref_hidden_BTH = cast(torch.Tensor, ref_hidden_states)
        completion = slice(-ref_hidden_BTH.size(1), None)
        output = _exact_kl_output(
            hidden_states[:, completion],
            active_lm_head(self),
            labels[:, completion],
            ref_hidden_BTH,
            cast(ExactKLHead, kl_head),
            predicted_gradient,
        )
        output.aux_loss = backbone.aux_loss
        return output

    model.forward = types.MethodType(exact_kl_forward, model)


class _BackboneOutput(NamedTuple):
    """Last hidden states `(B, L, H)`, and a mixture of experts' load-balancing loss where it was asked for."""

    hidden_states: torch.Tensor
    aux_loss: torch.Tensor | None


def _run_backbone(model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> _BackboneOutput:
    """
    Run the model without its LM head; with the routers' loss, as the model itself makes it.

    Each family of models has its own loss, number of experts, and name for it. So the model's own forward makes the
    loss, and only the logits of one position.

    Raises:
        ValueError: the model makes no such loss.
    """
    if not kwargs.get("output_router_logits"):
        return _BackboneOutput(model.base_model(*args, use_cache=False, **kwargs).last_hidden_state, None)
    outputs: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with logits_of_last(model, 1):
            aux_loss = forward(model, *args, use_cache=False, **kwargs).aux_loss
    finally:
        hook.remove()
    if aux_loss is None:
        raise ValueError(
            f"router_aux_loss_coef weights a load-balancing loss, and {type(model).__name__} makes none. Set "
            "router_aux_loss_coef=0."
        )
    hidden_states = outputs[0].last_hidden_state
    # The number 0 where no layer has a router
    return _BackboneOutput(hidden_states, torch.as_tensor(aux_loss, device=hidden_states.device))


@contextmanager
def logits_of_last(model: PreTrainedModel, count: int) -> Iterator[None]:
    """
    The model's own forward computes the logits of the last `count` positions only.

    Not all models have the argument `logits_to_keep`.
    """
    head = cast(nn.Module, model.get_output_embeddings())
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, -count:],))
    try:
        yield
    finally:
        hook.remove()


def active_lm_head(model: PreTrainedModel) -> nn.Linear:
    """The LM head that is active now: PEFT keeps a trained copy beside the original one in `modules_to_save`."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    return cast(nn.Linear, head)


def _full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    # A module that FSDP2 wraps by itself, as it is done with trained modules under PEFT, keeps its parameters sharded
    # outside its own forward. Each process then has the gradient of its own tokens, and nothing else averages them
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


class _HeadParameters(NamedTuple):
    """Weight and bias of an LM head, as full tensors."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> "_HeadParameters":
        return cls(_full_tensor(module.weight), None if module.bias is None else _full_tensor(module.bias))


def _exact_kl_output(
    hidden_BTH: torch.Tensor,
    policy_head: nn.Linear,
    labels_BT: torch.Tensor,
    ref_hidden_BTH: torch.Tensor,
    kl_head: ExactKLHead,
    predicted_gradient: ClippedLossGradient | None,
) -> ExactKLOutput:
    """Run the fused head on the labelled tokens only, and put its statistics back in place."""
    settings = kl_head.settings
    policy = _HeadParameters.of(policy_head)
    reference_head = cast(Any, kl_head.reference_head)()
    reference = None if reference_head is policy_head else _HeadParameters.of(reference_head)
    # With a model split over devices, the head can live on another one than the backbone's end
    device = policy.weight.device
    labels_BT = labels_BT.to(device)
    mask_BT = labels_BT != -100
    hidden_MH = hidden_BTH.to(device)[mask_BT]
    ref_hidden_MH = ref_hidden_BTH.to(device)[mask_BT]
    autocast: Any = nullcontext()
    if settings.cast_to_fp32:
        hidden_MH = hidden_MH.float()
        ref_hidden_MH = ref_hidden_MH.float()
        autocast = torch.autocast(device.type, enabled=False)
    parameters: list[Any] = [*policy] if reference is None else [*policy, *reference]
    with autocast, maybe_gather_lm_head_ctx(*parameters):
        stats = fused_token_stats_for_loss(
            hidden_MH,
            policy.weight,
            labels_BT[mask_BT],
            ref_hidden_MH,
            None if reference is None else reference.weight.to(device),
            bias=policy.bias,
            ref_bias=None if reference is None else reference.bias,
            temperature=settings.temperature,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
            direction=kl_head.direction,
            logits_memory_bytes=kl_head.logits_memory_bytes,
            predicted_gradient=None if predicted_gradient is None else predicted_gradient.at(mask_BT),
            second_pass=kl_head.second_pass,
            gather_head=maybe_gather_lm_head_ctx,
        )
    logp, entropy, kl, ref_logp = (x.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x) for x in stats)
    return ExactKLOutput(log_probs=logp, entropy=entropy, label_mask=mask_BT, kl=kl, ref_log_probs=ref_logp)
