"""The configuration: TRL's, plus the fields of this package, all checked when it is built."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, cast

from ._trl import ADVANTAGE_EPS, GRPOConfig
from .advantages.estimators import ESTIMATORS, estimator_name, find_estimator
from .advantages.settings import GAMMA_UNITS, AdvantageSettings
from .kl.divergences import DIVERGENCES, Divergence
from .loss import LOSS_REDUCTIONS
from .rewards.transforms import parse_transform
from .rewards.types import plain
from .rewards.weights import parse_weight
from .tables import check_choice, find_row


SUPERVISIONS = ("outcome", "process")
KL_ESTIMATORS = ("k3", "k1", "k2", "exact")
KL_REDUCTIONS = ("loss_type", "token_mean")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
POSITION_BASELINES = tuple(ESTIMATORS["position"].options["position_baseline"])
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
        advantage_estimator (`str`, *optional*, defaults to `"position"`):
            How process rewards become advantages, a row of [`~trl_grpo_ext.ESTIMATORS`]: `"position"` (returns,
            normalised across the group at each token index), `"pooled"` (step rewards normalised over the whole
            group, then returns; DeepSeekMath, arXiv 2402.03300 section 4.1.3), `"step"` (the k-th steps of the group
            normalised together, then returns) or `"min"` (soft minimum over the steps, leave-one-out baseline; PURE,
            arXiv 2504.15275). `"module:name"` is the import path of an [`~trl_grpo_ext.Estimator`], or of a function
            that maps [`~trl_grpo_ext.advantages.comparisons.EstimatorInputs`] with returns to advantages. Such a
            function itself is taken too, and becomes its import path.
        position_baseline (`str`, *optional*, defaults to `"all"`):
            With `"position"`, at indices where some completions of the group have ended: `"all"` counts these as
            return 0, `"active"` leaves them out. `"leave_one_out"` compares a completion with the mean of the others,
            and counts ended ones as return 0: its expected update is the policy gradient, where that of `"all"` is
            `1 - 1/G` of it.
        gamma (`float` or `list[float]`, *optional*, defaults to `0.99`):
            Discount in `[0, 1]`, one for all reward sources or one per source.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            `"token"` discounts at every token, `"step"` only where a step ends: of the same source where each source
            has returns of its own, else of any source. `"turn"` discounts only where a turn ends, between which are
            the outputs of tools or of an environment.
        reward_weights (`list[float | str]`, *optional*):
            TRL's field: one per reward source. A weight may be the text of a schedule, `"PATH:FIRST:LAST"` or
            `"PATH:FIRST:LAST:OVER"`, with the path `linear`, `cosine` or `step`: from the weight FIRST to LAST over
            the share OVER of training, by default all of it; a step comes where this share is over. See
            [`~trl_grpo_ext.rewards.weights.WeightSchedule`].
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
        kl_direction (`str`, *optional*, defaults to `"reverse"`):
            With the exact KL, a row of [`~trl_grpo_ext.DIVERGENCES`]: `"reverse"`, `KL(policy || reference)`, or
            `"forward"`, `KL(reference || policy)`, which is infinite where the policy excludes a token that the
            reference allows. `"module:name"` is the import path of a [`~trl_grpo_ext.Divergence`].
        kl_reduction (`str`, *optional*, defaults to `"loss_type"`):
            How per-token KLs become the loss term: `"loss_type"` reduces them as `loss_type` reduces the policy term,
            `"token_mean"` takes their mean over all loss tokens of the optimizer step.
        logits_memory_bytes (`int`, *optional*):
            With the exact KL: bytes that logits may take at one moment. By default, on a GPU, those of 2,048 tokens of
            both models, at most an eighth of its memory: 1.25 GB with a vocabulary of 152,064 in bfloat16. On a CPU,
            256 MiB. Less memory costs time.
        prompt_separator (`str`, *optional*):
            Text whose tokens are appended to every tokenized prompt before generation.
        reward_batch_tokens (`int`, *optional*):
            Largest number of padded tokens in one forward of a reward model. By default the whole batch is one
            forward, as in TRL.
        log_credit (`int`, *optional*, defaults to `0`):
            Number of groups that are recorded at each logged step and evaluation, token by token, in
            `output_dir/credit`. 0 records nothing. Columns: [`~trl_grpo_ext.credit.columns`].

    `importance_sampling_level` takes one more value, `"sequence_token"` (GSPO-token, arXiv 2507.18071 section 4.3):
    the value of the sequence's ratio with the gradient of the token's, which keeps per-token advantages.
    """

    supervision: Literal["outcome", "process"] = field(
        default="outcome",
        metadata={"help": "One advantage per completion (`outcome`, TRL's own) or per token (`process`)."},
    )
    # Not a `Literal`: a row that is added to the table, or found by import path, is a choice too
    advantage_estimator: str = field(
        default="position",
        metadata={
            "help": f"How process rewards become advantages: {', '.join(ESTIMATORS)}, or MODULE:NAME of an Estimator."
        },
    )
    position_baseline: Literal["all", "active", "leave_one_out"] = field(
        default="all",
        metadata={
            "help": "For `position`: completions that have ended count as return 0 (`all`) or not at all (`active`); "
            "or the mean is that of the other completions (`leave_one_out`)."
        },
    )
    # The parser takes the type of a union from its second member and a list's default from a factory
    gamma: float | list[float] | str = field(
        default_factory=lambda: _GAMMA,
        metadata={"help": "Discount in [0, 1]: one for all reward sources, or one per source."},
    )
    gamma_unit: Literal["token", "step", "turn"] = field(
        default="token",
        metadata={"help": "Discount at every token (`token`), or only where a step (`step`) or a turn (`turn`) ends."},
    )
    # Texts, so that the command line takes schedules too
    reward_weights: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "One per reward source: a number, or a schedule PATH:FIRST:LAST[:OVER] with PATH `linear`, "
            "`cosine` or `step`, over a share of training. By default all are 1."
        },
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
    kl_direction: str = field(
        default="reverse",
        metadata={
            "help": "With the exact KL: KL(policy || reference) (`reverse`), KL(reference || policy) (`forward`), or "
            "MODULE:NAME of a Divergence."
        },
    )
    kl_reduction: Literal["loss_type", "token_mean"] = field(
        default="loss_type",
        metadata={"help": "Reduce the KL as `loss_type` reduces the policy term, or to its mean over loss tokens."},
    )
    logits_memory_bytes: int | None = field(
        default=None,
        metadata={"help": "With the exact KL: bytes that logits may take at one moment. Default: by device and head."},
    )
    prompt_separator: str | None = field(
        default=None,
        metadata={"help": "Text whose tokens are appended to every tokenized prompt before generation."},
    )
    reward_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Largest number of padded tokens in one forward of a reward model. Default: no bound."},
    )
    log_credit: int = field(
        default=0,
        metadata={"help": "Groups recorded token by token in OUTPUT_DIR/credit at each logged step (0: none)."},
    )

    # Not a field. Set by the trainer of this package, and by no other
    has_its_trainer = False

    def __new__(cls, *args: Any, **kwargs: Any):
        parameters = inspect.signature(cls.__init__).parameters
        # A subclass may have a constructor of its own, which takes whatever it takes
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known = list(parameters)
        for name in kwargs:
            if name not in known and not takes_all:
                nearest = get_close_matches(name, known, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else "."
                raise TypeError(f"{cls.__name__} has no field '{name}'{hint}")
        return super().__new__(cls)

    def __post_init__(self):
        _check_loss_type(self)
        _rename_checkpointing(self)
        super().__post_init__()
        weights = cast(Any, _check_weights(self.reward_weights))
        self.reward_weights = weights  # pyright: ignore[reportIncompatibleVariableOverride]
        self.advantage_estimator = estimator_name(self.advantage_estimator)
        self.gamma = _check_gamma(self.gamma)
        self.reward_transforms = _as_names("reward_transforms", self.reward_transforms)
        self.outcome_gate = _as_names("outcome_gate", self.outcome_gate)
        for name in self.reward_transforms or []:
            parse_transform(name)
        _check_choices(self)
        _check_numbers(self)
        if self.prompt_separator is not None and not (
            isinstance(self.prompt_separator, str) and self.prompt_separator
        ):
            raise ValueError(
                f"prompt_separator must be a text that is not empty, or None; got {self.prompt_separator!r}."
            )
        if self.supervision == "outcome":
            _warn_of_unused(self)
        else:
            _check_process(self)
        _check_sync(self)
        _check_kl(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """That of transformers. Any trainer calls it when training starts: a warning if it is none of this package."""
        ignored = _own_fields_in_use(self)
        if ignored and not self.has_its_trainer:
            warnings.warn(
                f"the trainer of this {type(self).__name__} does not read {', '.join(ignored)}. Use GRPOExtTrainer of "
                "trl_grpo_ext, or leave them at their defaults.",
                UserWarning,
                stacklevel=2,
            )
        return super().get_warmup_steps(num_training_steps)

    @property
    def uses_trl_kl(self) -> bool:
        """Whether the KL term of the loss, if any, is TRL's own."""
        return self.kl_estimator == "k3" and self.kl_reduction == "loss_type"

    @property
    def estimator_options(self) -> dict[str, Any]:
        """
        The fields that the advantage estimator reads, by name: its row's [`~trl_grpo_ext.Estimator`]`.options`.

        Raises:
            ValueError: the row names a field that this config does not have.
        """
        values = {known.name: self.__dict__[known.name] for known in fields(self)}
        names = find_estimator(self.advantage_estimator).options
        for name in names:
            if name not in values:
                raise ValueError(
                    f"advantage_estimator={self.advantage_estimator!r} reads the option {name!r}, and "
                    f"{type(self).__name__} has no such field. Add one in a subclass."
                )
        return {name: values[name] for name in names}

    @property
    def advantage_settings(self) -> AdvantageSettings:
        """How advantages are made of rewards."""
        is_process = self.supervision == "process"
        return AdvantageSettings(
            # Outcome supervision is process supervision of completions of one token, where `position` is TRL's formula
            estimator=self.advantage_estimator if is_process else "position",
            gamma=cast(float | list[float], self.gamma) if is_process else 1.0,
            gamma_unit=self.gamma_unit,
            options=self.estimator_options if is_process else {},
            aggregation=self.multi_objective_aggregation,
            scale=cast(str, self.scale_rewards),
            eps=self.advantage_eps,
        )

    def check_sources(self, names: Sequence[str]) -> None:
        """Raise `ValueError` if a field with an entry per reward source does not fit the sources."""
        per_source = {
            "gamma": self.gamma,
            "reward_transforms": self.reward_transforms,
            "outcome_gate": self.outcome_gate,
        }
        for field_name, values in per_source.items():
            if isinstance(values, list) and len(values) != len(names):
                raise ValueError(
                    f"{field_name} has {len(values)} entries for {len(names)} reward sources ({', '.join(names)})."
                )


def _rename_checkpointing(config: GRPOExtConfig) -> None:
    """Give transformers 5.23 and later TRL's `gradient_checkpointing` under its new name, before they warn of it."""
    if "activation_checkpointing" in [known.name for known in fields(config)]:
        if config.activation_checkpointing is None:
            config.activation_checkpointing = config.gradient_checkpointing
        if config.activation_checkpointing_kwargs is None:
            config.activation_checkpointing_kwargs = config.gradient_checkpointing_kwargs


def _as_names(field_name: str, names: Any) -> list[str] | None:
    if names is None:
        return None
    # A YAML string where a list belongs reaches the config as it is
    found = [names] if isinstance(names, str) else names
    if not (isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found)):
        raise ValueError(f"{field_name} must be a list of names, one per reward source; got {names!r}.")
    return list(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_choices(config: GRPOExtConfig) -> None:
    check_choice("supervision", config.supervision, SUPERVISIONS)
    find_estimator(config.advantage_estimator, "advantage_estimator").with_options(config.estimator_options)
    # Of the other estimators' options too, which are not read
    check_choice("position_baseline", config.position_baseline, POSITION_BASELINES)
    check_choice("gamma_unit", config.gamma_unit, GAMMA_UNITS)
    check_choice("kl_estimator", config.kl_estimator, KL_ESTIMATORS)
    find_row("kl_direction", config.kl_direction, DIVERGENCES, Divergence)
    check_choice("kl_reduction", config.kl_reduction, KL_REDUCTIONS)
    check_choice("importance_sampling_level", config.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)


def _check_loss_type(config: GRPOExtConfig) -> None:
    known = [name for name in LOSS_REDUCTIONS if name != "token_mean"]
    if config.loss_type not in known:
        hint = " For GSPO set importance_sampling_level='sequence'." if config.loss_type == "gspo" else ""
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, known))}; got {config.loss_type!r}.{hint}")


def _check_gamma(gamma: Any) -> float | list[float]:
    """Discounts as a float, or a list with one for each of several sources."""
    gammas = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma]
    for value in gammas:
        if not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"gamma must be a number in [0, 1], or a list of such; got {gamma!r}.")
    if not gammas:
        raise ValueError("gamma is an empty list; give one discount, or one per reward source.")
    return float(gammas[0]) if len(gammas) == 1 else [float(value) for value in gammas]


def _check_weights(weights: Any) -> list[float | str] | None:
    """Numbers, and the texts of schedules."""
    if weights is None:
        return None
    values = plain(weights)
    # A YAML file may have the weight of a single source by itself
    values = [values] if _is_number(values) or isinstance(values, str) else values
    if not isinstance(values, list):
        raise ValueError(f"reward_weights must be a list, one per reward source; got {weights!r}.")
    try:
        parsed = [parse_weight(value) for value in values]
    except ValueError as error:
        raise ValueError(f"reward_weights must have a weight per reward source; got {weights!r}: {error}") from None
    pairs = zip(values, parsed, strict=True)
    return [value if weight.changes else weight.first for value, weight in pairs]


def _check_numbers(config: GRPOExtConfig) -> None:
    if not (_is_number(config.beta) and 0 <= config.beta < math.inf):
        raise ValueError(f"beta must be a finite number, 0 or larger; got {config.beta!r}.")
    eps = config.advantage_eps
    if not (_is_number(eps) and 0 <= eps < math.inf):
        raise ValueError(f"advantage_eps must be a finite number, 0 or larger; got {eps!r}.")
    if config.logits_memory_bytes is not None and not _is_positive_integer(config.logits_memory_bytes):
        raise ValueError(f"logits_memory_bytes must be an integer, 1 or larger; got {config.logits_memory_bytes!r}.")
    if config.reward_batch_tokens is not None and not _is_positive_integer(config.reward_batch_tokens):
        raise ValueError(f"reward_batch_tokens must be an integer, 1 or larger; got {config.reward_batch_tokens!r}.")
    if config.log_credit != 0 and not _is_positive_integer(config.log_credit):
        raise ValueError(f"log_credit must be an integer, 0 or larger; got {config.log_credit!r}.")
    if config.log_credit and config.logging_strategy != "steps":
        raise ValueError(
            f"log_credit records the steps that are logged, and logging_strategy={config.logging_strategy!r} names "
            "none. Use logging_strategy='steps'."
        )


def _changed(values: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Names of the fields whose value is not their default."""
    return [name for name, (value, default) in values.items() if value != default]


def _own_fields_in_use(config: GRPOExtConfig) -> list[str]:
    """Names of the fields of this package whose value is not their default."""
    upstream = {upstream_field.name for upstream_field in fields(GRPOConfig)}
    own = [own_field for own_field in fields(GRPOExtConfig) if own_field.name not in upstream]
    built = config.to_dict()
    return _changed({own_field.name: (built[own_field.name], _default(own_field)) for own_field in own})


def _default(config_field: Field) -> Any:
    return config_field.default if config_field.default_factory is MISSING else config_field.default_factory()


def _warn_of_unused(config: GRPOExtConfig) -> None:
    """Outcome supervision has TRL's one advantage per completion, which these fields do not shape."""
    unused = _changed(
        {
            "advantage_estimator": (config.advantage_estimator, "position"),
            "position_baseline": (config.position_baseline, "all"),
            "gamma": (config.gamma, _GAMMA),
            "gamma_unit": (config.gamma_unit, "token"),
        }
    )
    if unused:
        warnings.warn(f"{', '.join(unused)} only act with supervision='process'.", UserWarning, stacklevel=4)


def _check_process(config: GRPOExtConfig) -> None:
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
    several = len(set(_counted_gammas(config.gamma, config.reward_weights))) > 1
    merges = config.multi_objective_aggregation == "sum_then_normalize"
    if several and merges and find_estimator(config.advantage_estimator).normalizes == "step_rewards":
        raise ValueError(
            f"advantage_estimator={config.advantage_estimator!r} with 'sum_then_normalize' adds the sources' step "
            f"rewards before they are discounted, so it takes one gamma; got {config.gamma}. Use one gamma, or "
            "multi_objective_aggregation='normalize_then_sum'."
        )


def _counted_gammas(gamma: Any, weights: Any) -> list[float]:
    """The discounts, without those of sources whose weight is always 0, which are in no sum."""
    gammas = gamma if isinstance(gamma, list) else [gamma]
    if weights is None or len(weights) != len(gammas):
        return gammas
    return [value for value, weight in zip(gammas, weights, strict=True) if weight != 0]


def _check_sync(config: GRPOExtConfig) -> None:
    if not config.sync_ref_model:
        return
    if config.beta == 0.0:
        raise ValueError("sync_ref_model=True has no reference to move with beta=0. Set beta > 0, or leave it out.")
    alpha = config.ref_model_mixup_alpha
    if not (_is_number(alpha) and 0 < alpha <= 1):
        raise ValueError(f"ref_model_mixup_alpha must be a number in (0, 1]; got {alpha!r}.")
    if not _is_positive_integer(config.ref_model_sync_steps):
        raise ValueError(f"ref_model_sync_steps must be an integer, 1 or larger; got {config.ref_model_sync_steps!r}.")


def _check_kl(config: GRPOExtConfig) -> None:
    if config.beta == 0.0 and not config.uses_trl_kl:
        raise ValueError(
            f"kl_estimator={config.kl_estimator!r} with kl_reduction={config.kl_reduction!r} has no effect with "
            "beta=0, where there is no KL term and no reference. Set beta > 0, or leave both at their defaults."
        )
    if config.kl_direction != "reverse" and config.kl_estimator != "exact":
        raise ValueError(
            f"kl_direction={config.kl_direction!r} needs kl_estimator='exact': the estimates from the sampled token, "
            f"{config.kl_estimator!r} among them, are of KL(policy || reference)."
        )
    if config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        raise ValueError(
            "kl_estimator='k1' without the importance ratio has a gradient of 0 in expectation, so the reference "
            "would not act. Leave use_bias_correction_kl=True, or use 'k2', 'k3' or 'exact'."
        )
