r"""
The divergences of policy and reference over the whole vocabulary: one table, one row for each.

Every row is an f-divergence of the policy's next-token distribution p and the reference's q:

    D = sum_v p_v f(q_v / p_v)

D is homogeneous of degree one in (p, q). By Euler's theorem its value is therefore made of its own derivatives, the
scores s of the policy and r of the reference:

    s_v = dD / dp_v
    r_v = dD / dq_v
    D   = sum_v p_v s_v + sum_v q_v r_v

The gradient with respect to the policy's logits z is a softmax gradient, with s as what is averaged:

    dD / dz_v = p_v (s_v - sum_u p_u s_u)

Since p and q sum to 1, a constant can be added to s and subtracted from r. The rows choose it such that both scores
are 0 where p_v = q_v:

| row | D | s | r |
|---|---|---|---|
| `"reverse"` | `sum_v p_v log(p_v / q_v)` | `log(p_v / q_v)` | `1 - p_v / q_v` |
| `"forward"` | `sum_v q_v log(q_v / p_v)` | `1 - q_v / p_v` | `log(q_v / p_v)` |

That choice keeps small values from drowning in rounding. Each term `p_v s_v + q_v r_v` is then of second order in the
log-ratio, and not negative: for the reverse KL it is `p log(p / q) + q - p`. The sum of `q - p` would be 0 without
rounding. With rounding, it is minus the error of `sum_v p_v log(p_v / q_v)` that comes from p and q not summing to 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..tables import check_choice, find_row


class Distributions(NamedTuple):
    """
    Next-token distributions of the two models for a few tokens; all tensors have shape `(M, V)`.

    Args:
        p (`torch.Tensor`):
            The policy's probabilities.
        q (`torch.Tensor`):
            The reference's probabilities.
        log_ratio (`torch.Tensor`):
            `log p - log q`, from the logits: finite also where p or q is too small for its dtype and therefore 0.
            Where a logit is -inf, it is `-inf` (only the policy excludes the token), `inf` (only the reference does)
            or 0 (the probability that the row's [`Divergence.weight`] names is 0).
    """

    p: torch.Tensor
    q: torch.Tensor
    log_ratio: torch.Tensor


@dataclass(frozen=True)
class Divergence:
    """
    One divergence: a row of [`DIVERGENCES`].

    The two functions with a trailing underscore are called one after the other, by the fused head, on a few tokens at
    a time. They may overwrite their arguments, p excepted, to spare memory and time.

    Args:
        dense (`Callable`):
            The definition: from the log-probs `(..., V)` of policy and reference to the values `(...)`,
            differentiable.
        means_ (`Callable`):
            From [`Distributions`] and a tensor `(M, V)` that is free to be overwritten to the pair of columns `(M, 1)`
            whose sum is the divergence, `sum_v p_v s_v` and `sum_v q_v r_v`. Has to leave in place what
            `weighted_score_` reads.
        weighted_score_ (`Callable`):
            From [`Distributions`] to `p_v s_v`, `(M, V)`. It stays finite where p is 0 and s is not.
        weight (`str`, *optional*, defaults to `"policy"`):
            `"policy"` or `"reference"`: whose probabilities the log-ratio is multiplied by. Where they are 0, the
            log-ratio is set to 0 beforehand, so that `0 log 0 = 0`. A divergence whose terms would multiply it by both
            has to be written from p and q instead.

    Raises:
        ValueError: `weight` is neither of its values.
    """

    dense: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    means_: Callable[[Distributions, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    weighted_score_: Callable[[Distributions], torch.Tensor]
    weight: Literal["policy", "reference"] = "policy"

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, ("policy", "reference"))


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`sum_v a_v b_v` as a column, without a tensor for the products."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _difference_(log_ratio: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """
    `sum_v (b_v - a_v)` as a column, with `log_ratio = log b - log a`, to the precision of the log-ratios.

    Two sums of probabilities are both 1 but for rounding, and their difference would be nothing but rounding. Instead,

        b - a = a expm1(log_ratio)

    loses nothing where the two are close. Where b is larger than `e a`, the exponential could overflow, or `a` be 0.
    There the log-ratio is clamped to 1, and the rest, `b - e a`, is added.

    Overwrites `log_ratio` and `scratch`, which may be `b`.
    """
    rest = torch.sub(b, a, alpha=math.e, out=scratch).clamp_(min=0).sum(-1, keepdim=True)
    return _sum_of_products(log_ratio.clamp_(max=1).expm1_(), a) + rest


# ---------------------------------------------------------------------------------------------------------------------
# Reverse KL


def _dense_kl(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    p = logp.exp()
    # 0 log 0 = 0
    return (p * (logp - ref_logp).masked_fill(p == 0, 0)).sum(-1)


def _reverse_means_(d: Distributions, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _sum_of_products(d.log_ratio, d.p), _difference_(torch.neg(d.log_ratio, out=scratch), d.p, d.q, d.q)


def _reverse_weighted_score_(d: Distributions) -> torch.Tensor:
    return d.log_ratio.mul_(d.p)


# ---------------------------------------------------------------------------------------------------------------------
# Forward KL: the reverse one with the models in each other's place


def _dense_forward_kl(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    return _dense_kl(ref_logp, logp)


def _forward_means_(d: Distributions, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reference_mean = -_sum_of_products(d.log_ratio, d.q)
    return _difference_(d.log_ratio, d.q, d.p, scratch), reference_mean


def _forward_weighted_score_(d: Distributions) -> torch.Tensor:
    # p (1 - q / p), which is finite where the policy excludes a token and the divergence is infinite
    return torch.sub(d.p, d.q, out=d.log_ratio)


DIVERGENCES: dict[str, Divergence] = {
    "reverse": Divergence(_dense_kl, _reverse_means_, _reverse_weighted_score_),
    "forward": Divergence(_dense_forward_kl, _forward_means_, _forward_weighted_score_, weight="reference"),
}
"""
The divergences by name, [`GRPOExtConfig`]'s `kl_direction`.

- `"reverse"`: `KL(policy || reference)`. Infinite where the reference excludes what the policy allows.
- `"forward"`: `KL(reference || policy)`. Infinite where the policy excludes what the reference allows. Its gradient
  with respect to the logits, `p - q`, is finite there too.

A row that is added here can be used by its name.
"""


def find_divergence(direction: str) -> Divergence:
    """
    The row of [`DIVERGENCES`] with this name, or at this import path.

    Raises:
        ValueError: the table has no such row, or the import path leads nowhere.
        TypeError: what is found is not a [`Divergence`].
    """
    return find_row("direction", direction, DIVERGENCES, Divergence)


def exact_divergence(logits: torch.Tensor, ref_logits: torch.Tensor, direction: str = "reverse") -> torch.Tensor:
    """
    Exact divergence of `p = softmax(logits)` and `q = softmax(ref_logits)`, in nats.

        "reverse":  sum_v p_v (log p_v - log q_v)
        "forward":  sum_v q_v (log q_v - log p_v)

    The sum is over the last dimension, from log-softmaxes in float32 (in float64 for float64 logits), with
    `0 log 0 = 0`. The reverse KL is infinite where q excludes what p allows, the forward KL where p excludes what q
    allows.

    This is the dense form. It holds several tensors of the size of the logits;
    [`~trl_grpo_ext.kl.fused.token_stats.fused_token_stats`] computes the same without them.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            The policy's logits, already scaled, capped and divided by the temperature.
        ref_logits (`torch.Tensor` of shape `(..., V)`):
            The reference's.
        direction (`str`, *optional*, defaults to `"reverse"`):
            A key of [`DIVERGENCES`].

    Returns:
        `torch.Tensor` of shape `(...)`, differentiable in both arguments.

    Raises:
        ValueError: the shapes differ, or the direction is unknown.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"`ref_logits` must have shape {tuple(logits.shape)}, got {tuple(ref_logits.shape)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.log_softmax(-1, dtype=dtype)
    ref_logp = ref_logits.log_softmax(-1, dtype=dtype)
    return find_divergence(direction).dense(logp, ref_logp)
