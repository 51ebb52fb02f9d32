"""The configuration: TRL's, plus the fields of this package, all checked when it is built."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from ._trl import ADVANTAGE_EPS, GRPOConfig
from .kl.fused.token_stats import LOGITS_MEMORY
from .rewards.transforms import parse_transform


_CHOICES = (
    "supervision",
    "process_advantage",
    "position_baseline",
    "gamma_unit",
    "kl_estimator",
    "kl_reduction",
)
_GAMMA = 0.99


@dataclass
class GRPOExtConfig(GRPOConfig):
    r"""
    Configuration of [`GRPOExtTrainer`]: [`~trl.GRPOConfig`] plus the fields below.

    With every field below at its default, training is [`~trl.GRPOTrainer`]'s.

    Parameters:
        supervision (`str`, *optional*, defaults to `"outcome"`):
            `"outcome"`: one advantage per completion, TRL's own. `"process"`: an advantage per token, from token and
            step rewards.
        process_advantage (`str`, *optional*, defaults to `"position"`):
            How process rewards become advantages: `"position"` (returns, normalised across the group at each token
            index), `"pooled"` (step rewards normalised over the whole group, then returns; DeepSeekMath, arXiv
            2402.03300 section 4.1.3), `"step"` (the k-th steps of the group normalised together, then returns) or
            `"min"` (soft-minimum over the steps, leave-one-out baseline; PURE, arXiv 2504.15275).
        position_baseline (`str`, *optional*, defaults to `"all"`):
            With `"position"`, at indices where some completions of the group have ended: `"all"` counts these as
            return 0, `"active"` leaves them out.
        gamma (`float` or `list[float]`, *optional*, defaults to `0.99`):
            Discount in `[0, 1]`, one for all reward sources or one per source.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            `"token"` discounts at every token, `"step"` only where a step ends: of the same source where each source
            has returns of its own, else of any source.
        advantage_eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation that advantages are divided by. The default is TRL's.
        reward_transforms (`list[str]`, *optional*):
            One per reward source, applied to its rewards before anything else: `"none"`, `"center"` (2p - 1), `"clip"`
            (min(r - 0.5, 0)) or `"clip:ETA"`, `"delta"` (r_k - r_{k+1}, last step 0), `"progress"` (r_k - r_{k-1}).
        outcome_gate (`list[str]`, *optional*):
            One per reward source: the name of the source that must be positive for this one's rewards to count, or
            `"none"`. Where it is 0, negative or `None`, this source counts as not judging, which is worth 0: gate
            rewards that are never negative.
        kl_estimator (`str`, *optional*, defaults to `"k3"`):
            KL of the policy to the reference in the loss, in nats: `"k3"` (TRL's), `"k1"`, `"k2"`, each from the one
            sampled token, or `"exact"`, the sum over the whole vocabulary. Anything but `"k3"` needs `beta` > 0.
        kl_reduction (`str`, *optional*, defaults to `"loss_type"`):
            How per-token KLs become the loss term: `"loss_type"` reduces them as `loss_type` reduces the policy term,
            `"token_mean"` takes their mean over all loss tokens of the optimizer step.
        logits_memory (`int`, *optional*, defaults to `268435456`):
            With the exact KL: bytes that tiles of logits may take at one moment (256 MiB), for a few hundred tokens of
            a large vocabulary in float32. Less than that is slower.
        prompt_separator (`str`, *optional*):
            Text whose tokens are appended to every tokenized prompt before generation.
        reward_batch_tokens (`int`, *optional*):
            Largest number of padded tokens in one forward of a reward model. By default the whole batch is one
            forward, as in TRL.

    `importance_sampling_level` takes one more value, `"sequence_token"` (GSPO-token, arXiv 2507.18071 section 4.3):
    the value of the sequence's ratio with the gradient of the token's, which keeps per-token advantages.
    """

    supervision: Literal["outcome", "process"] = field(
        default="outcome",
        metadata={"help": "One advantage per completion (`outcome`, TRL's own) or per token (`process`)."},
    )
    process_advantage: Literal["position", "pooled", "step", "min"] = field(
        default="position",
        metadata={"help": "How process rewards become advantages: `position`, `pooled`, `step` or `min`."},
    )
    position_baseline: Literal["all", "active"] = field(
        default="all",
        metadata={
            "help": "For `position`: completions that have ended count as return 0 (`all`) or not at all (`active`)."
        },
    )
    # The parser takes the type of a union from its second member and a list's default from a factory
    gamma: float | list[float] | str = field(
        default_factory=lambda: _GAMMA,
        metadata={"help": "Discount in [0, 1]: one for all reward sources, or one per source."},
    )
    gamma_unit: Literal["token", "step"] = field(
        default="token",
        metadata={"help": "Discount at every token (`token`) or only where a step ends (`step`)."},
    )
    advantage_eps: float = field(
        default=ADVANTAGE_EPS,
        metadata={"help": "Added to the standard deviation that advantages are divided by."},
    )
    reward_transforms: list[str] | None = field(
        default=None,
        metadata={"help": "One per reward source: `none`, `center`, `clip`, `clip:ETA`, `delta` or `progress`."},
    )
    outcome_gate: list[str] | None = field(
        default=None,
        metadata={
            "help": "One per reward source: name of the source that must be positive for it to count, or `none`."
        },
    )
    kl_estimator: Literal["k3", "k1", "k2", "exact"] = field(
        default="k3",
        metadata={
            "help": "KL to the reference in the loss: sampled (`k1`, `k2`, `k3`) or `exact` over the vocabulary."
        },
    )
    kl_reduction: Literal["loss_type", "token_mean"] = field(
        default="loss_type",
        metadata={"help": "Reduce the KL as `loss_type` reduces the policy term, or to its mean over loss tokens."},
    )
    logits_memory: int = field(
        default=LOGITS_MEMORY,
        metadata={"help": "With the exact KL: bytes that tiles of logits may take at one moment."},
    )
    prompt_separator: str | None = field(
        default=None,
        metadata={"help": "Text whose tokens are appended to every tokenized prompt before generation."},
    )
    reward_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Largest number of padded tokens in one forward of a reward model. Default: no bound."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_choices(self)
        self.gamma = _check_gamma(self.gamma)
        if not (_is_number(self.advantage_eps) and 0 <= self.advantage_eps < math.inf):
            raise ValueError(f"advantage_eps must be a finite number, 0 or larger; got {self.advantage_eps!r}.")
        separator = self.prompt_separator
        for name, budget in (("reward_batch_tokens", self.reward_batch_tokens), ("logits_memory", self.logits_memory)):
            optional = name == "reward_batch_tokens" and budget is None
            if not optional and not (isinstance(budget, int) and not isinstance(budget, bool) and budget > 0):
                raise ValueError(f"{name} must be an integer, 1 or larger; got {budget!r}.")
        if separator is not None and not (isinstance(separator, str) and separator):
            raise ValueError(f"prompt_separator must be a text that is not empty, or None; got {separator!r}.")
        self.reward_transforms = _as_list(self.reward_transforms)
        for name in self.reward_transforms or []:
            parse_transform(name)
        self.outcome_gate = _as_list(self.outcome_gate)
        _check_process(self)
        _check_sync(self)
        _check_kl(self)

    @property
    def uses_trl_kl(self) -> bool:
        """Whether the KL term of the loss, if any, is TRL's own."""
        return self.kl_estimator == "k3" and self.kl_reduction == "loss_type"

    def check_sources(self, names: Sequence[str]) -> None:
        """Raise `ValueError` if a field with an entry per reward source does not fit the sources."""
        for field_name in ("gamma", "reward_transforms", "outcome_gate"):
            values = vars(self)[field_name]
            if isinstance(values, list) and len(values) != len(names):
                raise ValueError(
                    f"{field_name} has {len(values)} entries for {len(names)} reward sources ({', '.join(names)})."
                )


def _as_list(names: list[str] | None) -> list[str] | None:
    # A YAML string where a list belongs reaches the config as it is
    return names if names is None else [names] if isinstance(names, str) else list(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choices(config: GRPOExtConfig) -> None:
    hints = get_type_hints(GRPOExtConfig)
    for name in _CHOICES:
        value, choices = vars(config)[name], get_args(hints[name])
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    levels = ("token", "sequence", "sequence_token")
    if config.importance_sampling_level not in levels:
        raise ValueError(
            f"importance_sampling_level must be one of {', '.join(map(repr, levels))}; "
            f"got {config.importance_sampling_level!r}."
        )


def _check_gamma(gamma: Any) -> float | list[float]:
    """Discounts as a float, or a list with one for each of several sources."""
    gammas = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma]
    for value in gammas:
        if not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"gamma must be a number in [0, 1], or a list of such; got {gamma!r}.")
    if not gammas:
        raise ValueError("gamma is an empty list; give one discount, or one per reward source.")
    return float(gammas[0]) if len(gammas) == 1 else [float(value) for value in gammas]


def _check_process(config: GRPOExtConfig) -> None:
    if config.supervision == "outcome":
        changed = {"process_advantage": "position", "position_baseline": "all", "gamma": _GAMMA, "gamma_unit": "token"}
        unused = [name for name, default in changed.items() if vars(config)[name] != default]
        if unused:
            warnings.warn(f"{', '.join(unused)} only act with supervision='process'.", UserWarning, stacklevel=4)
        return
    if config.importance_sampling_level == "sequence":
        raise ValueError(
            "importance_sampling_level='sequence' gives every token of a completion the mean advantage, which undoes "
            "supervision='process'. Use 'token', or 'sequence_token': the sequence's ratio with per-token advantages."
        )
    if config.off_policy_mask_threshold is not None:
        raise ValueError(
            "off_policy_mask_threshold drops off-policy completions whose advantage is negative; with "
            "supervision='process' a completion has advantages of both signs, and it would drop their negative tokens "
            "only. Leave it at None."
        )
    several = isinstance(config.gamma, list) and len(set(config.gamma)) > 1
    merges = config.multi_objective_aggregation == "sum_then_normalize"
    if several and merges and config.process_advantage in ("pooled", "step"):
        raise ValueError(
            f"process_advantage={config.process_advantage!r} with 'sum_then_normalize' adds the sources' step rewards "
            f"before they are discounted, so it takes one gamma; got {config.gamma}. Use one gamma, or "
            "multi_objective_aggregation='normalize_then_sum'."
        )


def _check_sync(config: GRPOExtConfig) -> None:
    if not config.sync_ref_model:
        return
    if config.beta == 0.0:
        raise ValueError("sync_ref_model=True has no reference to move with beta=0. Set beta > 0, or leave it out.")
    alpha, steps = config.ref_model_mixup_alpha, config.ref_model_sync_steps
    if not (_is_number(alpha) and 0 < alpha <= 1):
        raise ValueError(f"ref_model_mixup_alpha must be a number in (0, 1]; got {alpha!r}.")
    if not (isinstance(steps, int) and steps > 0):
        raise ValueError(f"ref_model_sync_steps must be an integer, 1 or larger; got {steps!r}.")


def _check_kl(config: GRPOExtConfig) -> None:
    if config.beta == 0.0 and not config.uses_trl_kl:
        raise ValueError(
            f"kl_estimator={config.kl_estimator!r} with kl_reduction={config.kl_reduction!r} has no effect with "
            "beta=0, where there is no KL term and no reference. Set beta > 0, or leave both at their defaults."
        )
    if config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        raise ValueError(
            "kl_estimator='k1' without the importance ratio has a gradient of 0 in expectation, so the reference "
            "would not act. Leave use_bias_correction_kl=True, or use 'k2', 'k3' or 'exact'."
        )
