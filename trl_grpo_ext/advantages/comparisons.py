"""
What each built-in estimator compares with what; how values are normalised follows from that.

Conventions of the functions:

- Groups are consecutive blocks of G rows. Only values of one group are compared with each other.
- Completions are packed: the L loss tokens of a completion are the first L columns of its row.
- Standard deviations have ddof 1.
- A set of values without spread, or of one completion, is normalised to exactly 0.
"""

from typing import NamedTuple

import torch

from .normalization import (
    Comparison,
    Moments,
    compare,
    completion_weights,
    grouped,
    mean_of_others,
    pack_order,
    standardize,
    weighted_moments,
)


class EstimatorInputs(NamedTuple):
    """
    What an estimator's function normalises, and how.

    Attributes:
        values_NT (`torch.Tensor` of shape `(N, T)`):
            Step rewards, NaN on tokens without one, or returns, 0 outside the mask: as the estimator's row says.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            True on loss tokens.
        judged_N (`torch.Tensor` of shape `(N,)`):
            True for completions with at least one reward. The others must not enter a mean or a standard deviation.
        group_size (`int`):
            Completions per group.
        scale (`str`):
            `"group"`, `"batch"` or `"none"`: the values whose standard deviation is divided by.
        eps (`float`):
            Added to every standard deviation that is divided by.
    """

    values_NT: torch.Tensor
    mask_NT: torch.Tensor
    judged_N: torch.Tensor
    group_size: int
    scale: str
    eps: float


class Compared(NamedTuple):
    """
    Values by group, and which of them are compared with each other.

    Args:
        values_PGT (`torch.Tensor` of shape `(P, G, T)`):
            Rewards or returns.
        weights_PGT (`torch.Tensor` of shape `(P, G, T)`):
            What each counts in means and standard deviations.
        group_dims (`tuple[int, ...]`):
            Axes of a group's values that are compared with each other.
        baseline (`torch.Tensor`, *optional*):
            What is subtracted, if not the mean of these.
        comparable_P11 (`torch.Tensor` of shape `(P, 1, 1)`, *optional*):
            False for groups that have nothing to compare and get 0.
        tokens_NT (`torch.Tensor` of shape `(N, T)`, *optional*):
            The token of each value, where the values are not those of the first tokens.
    """

    values_PGT: torch.Tensor
    weights_PGT: torch.Tensor
    group_dims: tuple[int, ...]
    baseline: torch.Tensor | None = None
    comparable_P11: torch.Tensor | None = None
    tokens_NT: torch.Tensor | None = None

    @property
    def is_by_column(self) -> bool:
        """Whether each column has statistics of its own."""
        return 2 not in self.group_dims

    def batch_moments(self, counted_N: torch.Tensor) -> Moments:
        """The moments, over all groups, of those completions that are counted here."""
        (counted_PG1,) = grouped(self.values_PGT.size(1), counted_N[:, None])
        return weighted_moments(self.values_PGT, self.weights_PGT * counted_PG1, (0, *self.group_dims))

    def statistics(self, scale: str, eps: float, batch: Moments | None = None) -> Comparison:
        """What [`~trl_grpo_ext.advantages.normalization.compare`] says; takes its arguments."""
        found = compare(
            self.values_PGT,
            self.weights_PGT,
            self.group_dims,
            scale=scale,
            eps=eps,
            baseline=self.baseline,
            batch=None if batch is None else batch.first(self.values_PGT.size(2)),
        )
        if self.comparable_P11 is None:
            return found
        return found._replace(counted=found.counted & self.comparable_P11)

    def on_tokens(self, values_PGT: torch.Tensor, unfilled_NT: torch.Tensor) -> torch.Tensor:
        """Values by group as `(N, T)`, in place of `unfilled_NT` where they stand on tokens of their own."""
        values_NT = values_PGT.expand_as(self.values_PGT).flatten(0, 1)
        return values_NT if self.tokens_NT is None else unfilled_NT.scatter(1, self.tokens_NT, values_NT)


def normalize(compared: Compared, inputs: EstimatorInputs, batch: Moments | None = None) -> torch.Tensor:
    """
    The normalised values, `(N, T)`; 0 where nothing is compared.

    Args:
        compared ([`Compared`]):
            What an estimator makes of the inputs.
        inputs ([`EstimatorInputs`]):
            With the scale.
        batch ([`~trl_grpo_ext.advantages.normalization.Moments`], *optional*):
            Of all groups, for the scale `"batch"`, where the inputs are not all of them.
    """
    statistics = compared.statistics(inputs.scale, inputs.eps, batch)
    normalized_PGT = standardize(compared.values_PGT, statistics, scale=inputs.scale)
    return compared.on_tokens(normalized_PGT, torch.zeros_like(inputs.values_NT))


def statistics_on_tokens(compared: Compared, inputs: EstimatorInputs, batch: Moments | None = None) -> Comparison:
    """The statistics of [`normalize`], `(N, T)` each; NaN, and not counted, on tokens without a value."""
    found = compared.statistics(inputs.scale, inputs.eps, batch)
    unknown_NT = torch.full_like(inputs.values_NT, torch.nan)
    return Comparison(
        compared.on_tokens(found.mean, unknown_NT),
        compared.on_tokens(found.std, unknown_NT),
        compared.on_tokens(found.divisor, unknown_NT),
        compared.on_tokens(found.counted, torch.zeros_like(inputs.mask_NT)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The built-in estimators


def compare_by_position(inputs: EstimatorInputs, *, position_baseline: str = "all") -> Compared:
    r"""
    Returns normalised across the group at each token index: return, then normalise.

    `A_{i,t} = (R_{i,t} - mean_j R_{j,t}) / (std_j R_{j,t} + eps)`

    over the judged completions j of i's group. Completions that ended before t count as return 0
    (`position_baseline="all"`) or not at all (`"active"`). With `"leave_one_out"` the mean is that of the other
    completions, ended ones counting as return 0:

    `A_{i,t} = (R_{i,t} - 1/(n-1) sum_{j != i} R_{j,t}) / (std_j R_{j,t} + eps)`

    The mean of `"all"` holds the completion's own return, so without a division its expected update is `1 - 1/n` of
    the policy gradient. That of `"leave_one_out"` is all of it. `"active"` has no such factor: which completions are
    compared depends on what they did.

    Reduces to TRL's advantages for one token per completion, and to RLOO with `"leave_one_out"` and `scale="none"`.
    """
    counted_NT = inputs.judged_N[:, None].expand_as(inputs.mask_NT)
    if position_baseline == "active":
        counted_NT = counted_NT & inputs.mask_NT
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT, counted_NT.to(inputs.values_NT))
    baseline_PGT = mean_of_others(values_PGT, weights_PGT) if position_baseline == "leave_one_out" else None
    return Compared(values_PGT, weights_PGT, (1,), baseline_PGT)


def compare_pooled(inputs: EstimatorInputs) -> Compared:
    r"""
    Step rewards normalised over all step rewards of the group (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

    `r~ = (r - mean(R)) / (std(R) + eps)`

    with R the step rewards of all completions of the group. A group with fewer than two judged completions has nothing
    to compare and gets 0: the step rewards of a single completion do have spread.

    Reduces to TRL's advantages for one reward per completion.
    """
    given_NT = ~inputs.values_NT.isnan()
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT.nan_to_num(), given_NT.to(inputs.values_NT))
    judged_P = inputs.judged_N.view(-1, inputs.group_size).sum(1)
    return Compared(values_PGT, weights_PGT, (1, 2), comparable_P11=(judged_P > 1)[:, None, None])


def compare_by_step(inputs: EstimatorInputs) -> Compared:
    r"""
    Step rewards normalised among the k-th steps of the group, for each k, as in LightRFT.

    `r~_{i,k} = (r_{i,k} - mean_j r_{j,k}) / (std_j r_{j,k} + eps)`

    over the completions j that have a k-th step. A k-th step that only one completion has gets 0.

    Reduces to TRL's advantages for one reward per completion.
    """
    given_NT = ~inputs.values_NT.isnan()
    # The token of each completion's k-th step reward in column k. Completions have far fewer steps than tokens
    most_steps = int(given_NT.sum(1).max())
    order_NS = pack_order(given_NT)[:, :most_steps]
    steps_NS = inputs.values_NT.gather(1, order_NS)
    values_PGS, weights_PGS = grouped(inputs.group_size, steps_NS.nan_to_num(), (~steps_NS.isnan()).to(steps_NS))
    return Compared(values_PGS, weights_PGS, (1,), tokens_NT=order_NS)


def compare_against_others(inputs: EstimatorInputs) -> Compared:
    r"""
    Returns minus the mean token return of the group's other completions, over the std of the token returns.

    `A_{i,t} = (R_{i,t} - 1/(n-1) sum_{j != i} m_j) / (std + eps)`, `m_j = 1/L_j sum_t R_{j,t}`

    over the n judged completions of i's group. In the std every completion counts once: its tokens have weight
    `1 / L_j`. `scale="none"` leaves the division out.

    PURE (arXiv 2504.15275; the verl branch of its code) divides the sums of the others' returns by the padded length
    instead of by their own, so that its baseline depends on the padding.

    Reduces to RLOO for outcome rewards at gamma = 1 and `scale="none"`.
    """
    weights_NT = completion_weights(inputs.mask_NT, inputs.judged_N, inputs.values_NT.dtype)
    values_PGT, weights_PGT = grouped(inputs.group_size, inputs.values_NT, weights_NT)
    means_PG1 = (weights_PGT * values_PGT).sum(2, keepdim=True)
    judged_PG1 = inputs.judged_N.view(-1, inputs.group_size, 1).to(means_PG1)
    return Compared(values_PGT, weights_PGT, (1, 2), mean_of_others(means_PG1, judged_PG1))
