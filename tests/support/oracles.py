"""
Float64 reference computations for the tests: plain loops over Python floats and NumPy arrays, written from the papers,
from TRL's source and from the pseudo-code that the package started from. Nothing of the package is imported here.

Conventions. `K` sources, `N` completions, `G` completions per group (consecutive rows), `T` completion tokens, `V`
vocabulary. A reward that was not given is NaN. A *stream* is one completion's rewards on its loss tokens only.
Spread is zero when fewer than two completions (or rewards) are compared, or when the standard deviation is no more
than rounding, `max(1e-14, 2.4e-7 * max|x|)`; a normalised value is then 0.
"""

import math

import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def ragged_batch(rng, sources, groups, group_size, length):
    """Random `rewards_KNT` and `mask_NT`: ragged and empty completions, holes in the mask, rewards outside the mask,
    sources missing for a completion, completions that nobody judges, and groups with zero spread."""
    completions = groups * group_size
    rewards = np.round(rng.normal(size=(sources, completions, length)), 2)
    rewards[rng.random(rewards.shape) < 0.4] = np.nan
    rewards[rng.random((sources, completions)) < 0.2] = np.nan
    rewards[:, rng.random(completions) < 0.1] = np.nan
    lengths = rng.integers(0, length + 1, size=completions)
    lengths[rng.random(completions) < 0.3] = length
    mask = np.arange(length)[None, :] < lengths[:, None]
    mask &= rng.random(mask.shape) > 0.15
    for group in range(groups):
        if rng.random() < 0.2:
            rows = slice(group * group_size, (group + 1) * group_size)
            first = rewards[:, rows][:, :1]
            rewards[:, rows] = np.where(np.isnan(first), np.nan, 0.35)
            mask[rows] = mask[rows][:1]
    return rewards, mask.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Returns
# ---------------------------------------------------------------------------------------------------------------------


def discounted_returns(rewards_NT, gamma, step_ends_NT=None):
    """`R_t = r_t + gamma R_{t+1}` (Sutton and Barto, eq. 3.9); with step ends, 1 in place of gamma at other tokens."""
    returns = np.zeros(np.shape(rewards_NT))
    for i, rewards in enumerate(np.asarray(rewards_NT, dtype=np.float64)):
        following = 0.0
        for t in reversed(range(len(rewards))):
            discount = gamma if step_ends_NT is None or step_ends_NT[i][t] else 1.0
            following = rewards[t] + discount * following
            returns[i, t] = following
    return returns


def discounted_return_closed_form(rewards_T, gamma, t):
    """`R_t = sum_{u >= t} gamma^(u - t) r_u`, the power taken of the distance and not of the index."""
    rewards = np.asarray(rewards_T, dtype=np.float64)[t:]
    return float(np.dot(np.float64(gamma) ** np.arange(len(rewards)), rewards))


# ---------------------------------------------------------------------------------------------------------------------
# Process advantages
# ---------------------------------------------------------------------------------------------------------------------


def moments(pairs):
    """Mean and standard deviation (ddof 1) of `(x, weight)` pairs, weight 0 = excluded, and whether spread is zero."""
    pairs = [(x, w) for x, w in pairs if w > 0]
    n = sum(w for _, w in pairs)
    if n <= 1 + 1e-9:  # weights 1/L sum to a whole number up to rounding
        return 0.0, 0.0, True
    mean = sum(w * x for x, w in pairs) / n
    std = float(np.sqrt(sum(w * (x - mean) ** 2 for x, w in pairs) / (n - 1)))
    return mean, std, std <= max(1e-14, 2.4e-7 * max(abs(x) for x, _ in pairs))


def standardise(group_pairs, batch_pairs, scale, eps):
    """Group values minus the group's mean, over the std of the group or of the batch (`scale_rewards` of TRL)."""
    mean, std, flat = moments(group_pairs)
    if scale == "batch":
        _, std, batch_is_flat = moments(batch_pairs)
        flat = flat or batch_is_flat
    divisor = 1.0 if scale == "none" else std + eps
    return [0.0 if flat or w == 0 else (x - mean) / divisor for x, w in group_pairs]


def stream_returns(stream, gamma, unit):
    """Discounted returns of one stream; NaN counts as 0. Under unit "step" a step ends where a reward is; a unit that
    is no text says at which tokens the stream is discounted."""
    ends = [unit]
    if isinstance(unit, str):
        ends = None if unit == "token" else [~np.isnan(stream)]
    return discounted_returns([np.nan_to_num(stream)], gamma, ends)[0]


def units(gamma_unit, mask_NT):
    """The unit of each completion's stream. A turn ends at a loss token after which is none: another's, or the end."""
    if gamma_unit != "turn":
        return [gamma_unit] * len(mask_NT)
    ends = [[t + 1 == len(row) or not row[t + 1] for t in range(len(row)) if row[t]] for row in mask_NT]
    return [np.array(row, dtype=bool) for row in ends]


def is_judged(stream):
    return bool(np.any(~np.isnan(stream)))


def position_advantages(returns, judged, group_size, baseline, scale, eps):
    """Returns compared with the group's returns at the same token index. Baseline "all" counts
    completions that have ended as return 0, "active" leaves them out. With "leave_one_out" the mean is that of the
    others, ended ones as 0: of n values, `x - mean of the others = n / (n - 1) (x - mean)`."""
    advantages = [np.zeros(len(r)) for r in returns]
    for t in range(max(len(r) for r in returns)):
        batch = []
        for r, counts in zip(returns, judged, strict=True):
            ended = t >= len(r)
            batch.append((0.0 if ended else r[t], float(counts and (baseline != "active" or not ended))))
        for start in range(0, len(returns), group_size):
            normalised = standardise(batch[start : start + group_size], batch, scale, eps)
            n = sum(judged[start : start + group_size])
            factor = n / (n - 1) if baseline == "leave_one_out" and n > 1 else 1.0
            for i, value in enumerate(normalised, start):
                if judged[i] and t < len(returns[i]):
                    advantages[i][t] = factor * value
    return advantages


def pooled_advantages(streams, group_size, gamma, units_N, scale, eps):
    """All rewards of the group normalised as one set, then summed to go (DeepSeekMath, arXiv 2402.03300, 4.1.3)."""
    batch = [(x, 1.0) for stream in streams for x in stream if not np.isnan(x)]
    advantages = []
    for start in range(0, len(streams), group_size):
        group = streams[start : start + group_size]
        pool = [(x, 1.0) for stream in group for x in stream if not np.isnan(x)]
        normalised = iter(standardise(pool, batch, scale, eps))
        alone = sum(is_judged(stream) for stream in group) < 2
        for stream, unit in zip(group, units_N[start : start + group_size], strict=True):
            values = np.array([np.nan if np.isnan(x) else next(normalised) for x in stream])
            advantages.append(np.zeros(len(stream)) if alone else stream_returns(values, gamma, unit))
    return advantages


def step_advantages(streams, group_size, gamma, units_N, scale, eps):
    """The s-th rewards of the group's completions normalised as one set for each s, then summed to go (LightRFT)."""
    places = [[t for t, x in enumerate(stream) if not np.isnan(x)] for stream in streams]
    normalised = [np.full(len(stream), np.nan) for stream in streams]
    for s in range(max(len(ends) for ends in places)):
        batch = [
            (i, stream[ends[s]]) for i, (stream, ends) in enumerate(zip(streams, places, strict=True)) if s < len(ends)
        ]
        for start in range(0, len(streams), group_size):
            group = [(i, x) for i, x in batch if start <= i < start + group_size]
            values = standardise([(x, 1.0) for _, x in group], [(x, 1.0) for _, x in batch], scale, eps)
            for (i, _), value in zip(group, values, strict=True):
                normalised[i][places[i][s]] = value
    return [stream_returns(values, gamma, unit) for values, unit in zip(normalised, units_N, strict=True)]


def soft_min_rewards(stream):
    """`r*_s = r_s exp(-r_s / 0.1) / sum_u exp(-r_u / 0.1)` over the completion's rewards (PURE, arXiv 2504.15275)."""
    given = stream[~np.isnan(stream)]
    if len(given) == 0:
        return stream.copy()
    exponentials = np.exp(-(stream - given.min()) / 0.1)
    return stream * exponentials / np.nansum(exponentials)


def min_advantages(returns, judged, group_size, scale, eps):
    """Returns of the soft-min rewards minus the mean return of the *other* completions (PURE, arXiv 2504.15275; RLOO,
    arXiv 2402.14740). The std counts every completion once: its tokens have weight `1 / L`."""

    def tokens(rows):
        return [(x, 1.0 / len(returns[j])) for j in rows if judged[j] for x in returns[j]]

    advantages = [np.zeros(len(r)) for r in returns]
    for i in range(len(returns)):
        start = i - i % group_size
        group = range(start, start + group_size)
        others = [float(np.mean(returns[j])) for j in group if j != i and judged[j]]
        _, std, flat = moments(tokens(group))
        if scale == "batch":
            _, std, batch_is_flat = moments(tokens(range(len(returns))))
            flat = flat or batch_is_flat
        if judged[i] and others and not flat:
            divisor = 1.0 if scale == "none" else std + eps
            advantages[i] = (returns[i] - sum(others) / len(others)) / divisor
    return advantages


def stream_advantages(streams_KN, weights, gammas, group_size, estimator, units_N, baseline, scale, eps):
    """One estimator for the weighted sum of the sources: of returns ("position", "min") or of rewards (the others)."""
    columns = list(zip(*streams_KN, strict=True))
    judged = [any(is_judged(stream) for stream in column) for column in columns]
    if estimator in ("position", "min"):
        returns = []
        for column, unit in zip(columns, units_N, strict=True):
            total = np.zeros(len(column[0]))
            for stream, weight, gamma in zip(column, weights, gammas, strict=True):
                rewards = soft_min_rewards(stream) if estimator == "min" else stream
                total += weight * stream_returns(rewards, gamma, unit)
            returns.append(total)
        if estimator == "min":
            return min_advantages(returns, judged, group_size, scale, eps)
        return position_advantages(returns, judged, group_size, baseline, scale, eps)
    combined = []
    for column in columns:
        total = np.full(len(column[0]), np.nan)
        for t in range(len(total)):
            given = [
                weight * stream[t] for stream, weight in zip(column, weights, strict=True) if not np.isnan(stream[t])
            ]
            total[t] = sum(given) if given else np.nan
        combined.append(total)
    (gamma,) = set(gammas)
    function = pooled_advantages if estimator == "pooled" else step_advantages
    return function(combined, group_size, gamma, units_N, scale, eps)


def batch_step(advantages, judged, eps):
    """Advantages minus the batch's mean, over the batch's std, each completion counted once: TRL's second
    normalisation under "normalize_then_sum" (`_generate_and_score_completions`)."""
    pairs = [(x, 1.0 / len(a)) for a, counts in zip(advantages, judged, strict=True) if counts for x in a]
    mean, std, flat = moments(pairs)
    return [
        (a - mean) / (std + eps) if counts and not flat else np.zeros(len(a))
        for a, counts in zip(advantages, judged, strict=True)
    ]


def process_advantages(
    rewards_KNT,
    mask_NT,
    weights_K,
    group_size,
    *,
    estimator,
    gamma,
    gamma_unit="token",
    baseline="all",
    aggregation="sum_then_normalize",
    scale="group",
    eps=1e-4,
):
    """`advantages_NT` of K sources: compaction to loss tokens, one of the four estimators, TRL's two orders of
    weighting and normalising (`multi_objective_aggregation`), scattered back with 0 outside the mask."""
    rewards = np.asarray(rewards_KNT, dtype=np.float64)
    keep = np.asarray(mask_NT).astype(bool)
    gammas = [gamma] * len(rewards) if np.ndim(gamma) == 0 else list(gamma)
    streams_KN = [[row[kept] for row, kept in zip(source, keep, strict=True)] for source in rewards]
    judged = [any(is_judged(stream) for stream in column) for column in zip(*streams_KN, strict=True)]
    options = (group_size, estimator, units(gamma_unit, keep), baseline)
    if aggregation == "sum_then_normalize":
        compact = stream_advantages(streams_KN, weights_K, gammas, *options, scale, eps)
    else:
        compact = [np.zeros(int(kept.sum())) for kept in keep]
        for streams, weight, source_gamma in zip(streams_KN, weights_K, gammas, strict=True):
            of_source = stream_advantages([streams], [1.0], [source_gamma], *options, "group", eps)
            compact = [total + weight * a for total, a in zip(compact, of_source, strict=True)]
        compact = batch_step(compact, judged, eps)
    advantages = np.zeros(keep.shape)
    for i, kept in enumerate(keep):
        advantages[i, kept] = compact[i]
    return advantages


def mt_grpo_advantages(turn_N, outcome_N, group_size, weight, eps=1e-4):
    """MT-GRPO for two turns (arXiv 2505.11821): each reward normalised within its group as in GRPO; the first turn
    gets `A_turn + weight * A_outcome`, the second one `A_outcome`. Returns the pair for each completion."""

    def normalised(values):
        blocks = np.asarray(values, dtype=np.float64).reshape(-1, group_size)
        return ((blocks - blocks.mean(1, keepdims=True)) / (blocks.std(1, ddof=1, keepdims=True) + eps)).ravel()

    of_turn, of_outcome = normalised(turn_N), normalised(outcome_N)
    return np.stack([of_turn + weight * of_outcome, of_outcome], axis=1)


def leave_one_out_advantages(returns, judged, group_size):
    """A return minus the mean return of the group's other judged completions at the same token index, where one that
    has ended counts as return 0: RLOO at each token, written from its definition."""
    advantages = [np.zeros(len(r)) for r in returns]
    for i in range(len(returns)):
        start = i - i % group_size
        others = [j for j in range(start, start + group_size) if j != i and judged[j]]
        for t in range(len(returns[i])):
            if judged[i] and others:
                values = [returns[j][t] if t < len(returns[j]) else 0.0 for j in others]
                advantages[i][t] = returns[i][t] - sum(values) / len(values)
    return advantages


def leave_one_out_process_advantages(
    rewards_KNT, mask_NT, weights_K, group_size, *, gamma, gamma_unit, aggregation, eps
):
    """`process_advantages` with that estimator, in both orders, for one gamma per source."""
    keep = np.asarray(mask_NT).astype(bool)
    streams_KN = [[row[kept] for row, kept in zip(source, keep, strict=True)] for source in np.asarray(rewards_KNT)]
    judged_KN = [[is_judged(stream) for stream in streams] for streams in streams_KN]
    judged = [any(column) for column in zip(*judged_KN, strict=True)]
    total = [np.zeros(int(kept.sum())) for kept in keep]
    for k, streams in enumerate(streams_KN):
        own = zip(streams, units(gamma_unit, keep), strict=True)
        of_source = [stream_returns(stream, gamma[k], unit) for stream, unit in own]
        if aggregation == "normalize_then_sum":
            of_source = leave_one_out_advantages(of_source, judged_KN[k], group_size)
        total = [x + weights_K[k] * y for x, y in zip(total, of_source, strict=True)]
    if aggregation == "sum_then_normalize":
        compact = leave_one_out_advantages(total, judged, group_size)
    else:
        compact = batch_step(total, judged, eps)
    advantages = np.zeros(keep.shape)
    for i, kept in enumerate(keep):
        advantages[i, kept] = compact[i]
    return advantages


# ---------------------------------------------------------------------------------------------------------------------
# Outcome advantages
# ---------------------------------------------------------------------------------------------------------------------


def _nan_mean_std(x):
    """`torch.nanmean` and TRL's `nanstd` (ddof 1, NaN with fewer than two values)."""
    given = [v for v in x if not np.isnan(v)]
    if not given:
        return np.nan, np.nan
    mean = sum(given) / len(given)
    if len(given) == 1:
        return mean, np.nan
    return mean, float(np.sqrt(sum((v - mean) ** 2 for v in given) / (len(given) - 1)))


def trl_outcome_advantages(
    rewards_NK, weights_K, group_size, aggregation="sum_then_normalize", scale="group", eps=1e-4
):
    """TRL 1.16's scalar advantages, from `GRPOTrainer._generate_and_score_completions`; NaN = a source gave None."""
    rewards = np.asarray(rewards_NK, dtype=np.float64)
    count = len(rewards)
    unscorable = [bool(np.all(np.isnan(row))) for row in rewards]

    def weighted_sum(rows):
        sums = [sum(w * v for w, v in zip(weights_K, row, strict=True) if not np.isnan(v)) for row in rows]
        return [np.nan if missing else total for missing, total in zip(unscorable, sums, strict=True)]

    advantages = np.zeros(count)
    if aggregation == "sum_then_normalize":
        totals = weighted_sum(rewards)
        for i in range(count):
            start = i - i % group_size
            mean, std = _nan_mean_std(totals[start : start + group_size])
            if scale == "batch":
                _, std = _nan_mean_std(totals)
            if (group_size if scale == "group" else count) == 1:
                std = 0.0
            advantages[i] = (totals[i] - mean) / (1.0 if scale == "none" else std + eps)
    else:
        normalised = np.zeros_like(rewards)
        for i in range(count):
            start = i - i % group_size
            for k in range(len(weights_K)):
                mean, std = _nan_mean_std(rewards[start : start + group_size, k])
                std = 0.0 if group_size == 1 else std
                normalised[i, k] = (rewards[i, k] - mean) / (std + eps)
        totals = weighted_sum(normalised)
        mean, std = _nan_mean_std(totals)
        std = 0.0 if count == 1 else std
        advantages = np.array([(total - mean) / (std + eps) for total in totals])
    return np.nan_to_num(advantages, nan=0.0)


def rloo_advantages(rewards_N, group_size):
    """`A_i = r_i - mean of the other rewards of the group` (RLOO, arXiv 2402.14740); at least two per group."""
    rewards = np.asarray(rewards_N, dtype=np.float64)
    advantages = np.zeros(len(rewards))
    for i in range(len(rewards)):
        start = i - i % group_size
        others = [rewards[j] for j in range(start, start + group_size) if j != i]
        advantages[i] = rewards[i] - sum(others) / len(others)
    return advantages


# ---------------------------------------------------------------------------------------------------------------------
# The detailed loop of the project's first sketch
# ---------------------------------------------------------------------------------------------------------------------


def seed_process_advantages(rewards_KNT, mask_NT, weights_K, group_size, gamma=0.99):
    """The first sketch's `compute_process_advantages`: weighted token rewards, 0 outside the mask, discounted, and at
    each index compared across the group (ddof 1, eps 1e-8). Outside the mask the document leaves values: its loss
    multiplies them by the mask, and so must a comparison."""
    rewards = np.zeros(np.shape(mask_NT))
    for weight, source in zip(weights_K, np.asarray(rewards_KNT, dtype=np.float64), strict=True):
        rewards += weight * np.where(np.asarray(mask_NT).astype(bool), source, 0.0)
    count, length = rewards.shape
    advantages = np.zeros((count, length))
    for start in range(0, count, group_size):
        future = np.zeros(group_size)
        for t in reversed(range(length)):
            future = rewards[start : start + group_size, t] + gamma * future
            mean = future.sum() / group_size
            std = np.sqrt(((future - mean) ** 2).sum() / (group_size - 1)) + 1e-8
            advantages[start : start + group_size, t] = (future - mean) / std
    return advantages


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def seed_loss(
    logits_NTV, ref_logits_NTV, tokens_NT, old_logp_NT, advantages_NT, mask_NT, *, epsilon=0.2, beta=0.01, max_len=None
):
    """
    Loss of the first sketch's detailed loop, `policy + beta * KL`, and its two terms: `(loss, policy, kl)`.

    `policy = -sum(min(ratio * A, clip(ratio) * A) * mask) / (N * max_len)`, the mean over all positions, padding
    included; `max_len` is the width that the document pads to (default: T). `kl = sum(KL * mask) / sum(mask)`, the
    divergence from policy to reference over the whole vocabulary, from log-softmax where the document adds 1e-10 to
    probabilities. Positions outside the mask are not read.
    """
    count, length, _ = np.shape(logits_NTV)
    policy, kl, tokens = 0.0, 0.0, 0
    for i in range(count):
        for t in range(length):
            if not mask_NT[i][t]:
                continue
            logp = log_softmax(np.asarray(logits_NTV[i][t], dtype=np.float64))
            ref_logp = log_softmax(np.asarray(ref_logits_NTV[i][t], dtype=np.float64))
            ratio = np.clip(np.exp(logp[tokens_NT[i][t]] - old_logp_NT[i][t]), 1e-10, 1e10)
            advantage = advantages_NT[i][t]
            policy -= min(ratio * advantage, np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
            kl += float(np.sum(np.exp(logp) * (logp - ref_logp)))
            tokens += 1
    policy /= count * (length if max_len is None else max_len)
    kl /= tokens
    return policy + beta * kl, policy, kl


def seed_loss_gradient(
    logits_NTV, ref_logits_NTV, tokens_NT, old_logp_NT, advantages_NT, mask_NT, *, epsilon=0.2, beta=0.01, max_len=None
):
    """
    Gradient of `seed_loss` with respect to the policy's logits, in closed form: with p the policy's probabilities,
    `d logp_a / d z_v = [v = a] - p_v` and `d KL / d z_v = p_v (log p_v - log q_v - KL)`. The policy term has no
    gradient where the clip holds the ratio.
    """
    count, length, _ = np.shape(logits_NTV)
    positions = count * (length if max_len is None else max_len)
    tokens = int(np.sum(np.asarray(mask_NT).astype(bool)))
    gradient = np.zeros(np.shape(logits_NTV))
    for i in range(count):
        for t in range(length):
            if not mask_NT[i][t]:
                continue
            logp = log_softmax(np.asarray(logits_NTV[i][t], dtype=np.float64))
            ref_logp = log_softmax(np.asarray(ref_logits_NTV[i][t], dtype=np.float64))
            p = np.exp(logp)
            kl = float(np.sum(p * (logp - ref_logp)))
            gradient[i, t] = beta / tokens * p * (logp - ref_logp - kl)
            ratio = np.exp(logp[tokens_NT[i][t]] - old_logp_NT[i][t])
            advantage = advantages_NT[i][t]
            held = ratio > 1 + epsilon if advantage > 0 else ratio < 1 - epsilon
            if not held and 1e-10 < ratio < 1e10:
                chosen = np.zeros(len(p))
                chosen[tokens_NT[i][t]] = 1.0
                gradient[i, t] -= advantage * ratio / positions * (chosen - p)
    return gradient


def divergence(logits_V, ref_logits_V, direction):
    """
    Value and gradient with respect to `logits_V` of one divergence between two softmaxes: `(value, gradient_V)`.

    `"reverse"`: `sum_v p_v log(p_v / q_v)`, gradient `p_v (log(p_v / q_v) - value)`. `"forward"`:
    `sum_v q_v log(q_v / p_v)`, gradient `p_v - q_v`. A term whose weight is 0 is 0.
    """
    with np.errstate(divide="ignore"):
        logp = log_softmax(np.asarray(logits_V, dtype=np.float64)).tolist()
        ref_logp = log_softmax(np.asarray(ref_logits_V, dtype=np.float64)).tolist()
    value = 0.0
    for log_p, log_q in zip(logp, ref_logp, strict=True):
        weight, log_ratio = (log_p, log_p - log_q) if direction == "reverse" else (log_q, log_q - log_p)
        value += math.exp(weight) * log_ratio if math.exp(weight) > 0 else 0.0
    gradient = []
    for log_p, log_q in zip(logp, ref_logp, strict=True):
        if direction == "forward":
            gradient.append(math.exp(log_p) - math.exp(log_q))
        else:
            gradient.append(math.exp(log_p) * (log_p - log_q - value) if math.exp(log_p) > 0 else 0.0)
    return value, np.array(gradient)
