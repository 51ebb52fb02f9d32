"""
Token rewards of one stream to group-relative advantages.

Conventions of this module: groups are consecutive blocks of G rows; `rewards_NT` holds NaN where no reward is given;
completions are packed, their loss tokens first (see [`~trl_grpo_ext.advantages.combine.process_advantages`]); standard
deviations have ddof 1; a set without spread, or of one completion, gets advantage exactly 0.
"""

import torch

from .normalization import completion_weights, grouped, pack_order, standardize


BASELINES = ("all", "active")

# PURE's softmax temperature over step rewards
SOFT_MINIMUM_TEMPERATURE = 0.1


def position_advantages(
    returns_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    judged_N: torch.Tensor,
    group_size: int,
    *,
    baseline: str,
    scale: str,
    eps: float,
) -> torch.Tensor:
    r"""
    Returns normalised across the group at each token index, the seed document's order: return, then normalise.

    `A_{i,t} = (R_{i,t} - mean_j R_{j,t}) / (std_j R_{j,t} + eps)` over the judged completions j of i's group, where
    completions that ended before t count as return 0 (`baseline="all"`) or not at all (`"active"`).

    Reduces to TRL's advantages for one token per completion.
    """
    counted_NT = judged_N[:, None] & (mask_NT if baseline == "active" else torch.ones_like(mask_NT))
    values_PGT, weights_PGT = grouped(group_size, returns_NT.where(mask_NT, 0.0), counted_NT.to(returns_NT))
    return standardize(values_PGT, weights_PGT, (1,), scale=scale, eps=eps).flatten(0, 1).where(mask_NT, 0.0)


def pooled_rewards(rewards_NT: torch.Tensor, group_size: int, *, scale: str, eps: float) -> torch.Tensor:
    r"""
    Step rewards normalised over all step rewards of the group; NaN where there is none.

    `r~ = (r - mean(R)) / (std(R) + eps)` with R the rewards of all completions of the group (DeepSeekMath, arXiv
    2402.03300, section 4.1.3). A group with fewer than two judged completions has nothing to compare and gets 0.

    Reduces to TRL's advantages for one reward per completion.
    """
    given_NT = ~rewards_NT.isnan()
    several_P = given_NT.any(1).view(-1, group_size).sum(1) > 1
    values_PGT, weights_PGT = grouped(group_size, rewards_NT.nan_to_num(), given_NT.to(rewards_NT))
    normalised_PGT = standardize(values_PGT, weights_PGT, (1, 2), scale=scale, eps=eps)
    return normalised_PGT.where(several_P[:, None, None], 0.0).flatten(0, 1).where(given_NT, torch.nan)


def step_rewards(rewards_NT: torch.Tensor, group_size: int, *, scale: str, eps: float) -> torch.Tensor:
    r"""
    Step rewards normalised among the k-th steps of the group, for each k; NaN where there is none.

    `r~_{i,k} = (r_{i,k} - mean_j r_{j,k}) / (std_j r_{j,k} + eps)` over the completions j that have a k-th step, as in
    LightRFT. A k-th step that only one completion has gets 0.
    """
    given_NT = ~rewards_NT.isnan()
    order_NT = pack_order(given_NT)
    packed_NT, has_NT = rewards_NT.gather(1, order_NT).nan_to_num(), given_NT.gather(1, order_NT)
    values_PGT, weights_PGT = grouped(group_size, packed_NT, has_NT.to(rewards_NT))
    normalised_NT = standardize(values_PGT, weights_PGT, (1,), scale=scale, eps=eps).flatten(0, 1)
    return torch.zeros_like(rewards_NT).scatter(1, order_NT, normalised_NT).where(given_NT, torch.nan)


def soft_minimum_rewards(rewards_NT: torch.Tensor, temperature: float = SOFT_MINIMUM_TEMPERATURE) -> torch.Tensor:
    r"""
    Step rewards weighted towards the completion's worst step; NaN where there is none.

    `r*_k = r_k softmax_k(-r_k / temperature)`, so that their sum approaches `min_k r_k` (PURE, arXiv 2504.15275).
    """
    given_NT = ~rewards_NT.isnan()
    logits_NT = (-rewards_NT / temperature).where(given_NT, -torch.inf)
    return (torch.softmax(logits_NT, dim=1) * rewards_NT).where(given_NT, torch.nan)


def leave_one_out_advantages(
    returns_NT: torch.Tensor, mask_NT: torch.Tensor, judged_N: torch.Tensor, group_size: int, *, scale: str, eps: float
) -> torch.Tensor:
    r"""
    Returns against the mean token return of the group's other completions.

    `A_{i,t} = R_{i,t} - 1/(n-1) sum_{j != i} m_j`, `m_j = 1/L_j sum_t R_{j,t}` over the n judged completions, divided
    by the std of the token returns, each completion counting once, unless `scale` is `"none"`. PURE (arXiv 2504.15275;
    the verl branch of its code) divides the sums of the others' returns by the padded length instead of by their own,
    so that its baseline depends on the padding.

    Reduces to RLOO for outcome rewards at gamma = 1 and `scale="none"`.
    """
    weights_NT = completion_weights(mask_NT, judged_N, returns_NT.dtype)
    values_PGT, weights_PGT = grouped(group_size, returns_NT.where(mask_NT, 0.0), weights_NT)
    means_PG1 = (weights_PGT * values_PGT).sum(2, keepdim=True)
    others_PG1 = judged_N.view(-1, group_size, 1).sum(1, keepdim=True).to(returns_NT) - 1
    baseline_PG1 = (means_PG1.sum(1, keepdim=True) - means_PG1) / others_PG1.clamp(min=1)
    advantages_PGT = standardize(values_PGT, weights_PGT, (1, 2), scale=scale, eps=eps, baseline=baseline_PG1)
    return advantages_PGT.flatten(0, 1)
