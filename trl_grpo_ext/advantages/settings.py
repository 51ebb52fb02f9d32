"""How advantages are made of rewards: the settings that computing and explaining them share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables import check_choice
from .estimators import Estimator, find_estimator
from .normalization import SCALES


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
GAMMA_UNITS = ("token", "step", "turn")


@dataclass(frozen=True)
class AdvantageSettings:
    """
    Settings of [`~trl_grpo_ext.advantages.combine.process_advantages`].

    Args:
        estimator (`str` or [`~trl_grpo_ext.Estimator`]):
            A key of [`~trl_grpo_ext.ESTIMATORS`], or an estimator that is not in the table; see
            [`~trl_grpo_ext.advantages.estimators.find_estimator`].
        gamma (`float` or `Sequence[float]`):
            Discount in `[0, 1]`, one for all sources or one each.
        gamma_unit (`str`, *optional*, defaults to `"token"`):
            Discount at every loss token, only at those that carry a reward (`"step"`), or only where a turn ends
            (`"turn"`).
        options (`Mapping[str, Any]`, *optional*):
            Options of the estimators by name; see [`~trl_grpo_ext.Estimator.with_options`].
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            TRL's `multi_objective_aggregation`: normalise the weighted sum, or each source (`"normalize_then_sum"`).
        scale (`str`, *optional*, defaults to `"group"`):
            TRL's `scale_rewards`: `"group"`, `"batch"` or `"none"`. As in TRL, `"normalize_then_sum"` ignores it.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to every standard deviation that is divided by.

    Raises:
        ValueError: unknown names or values.
    """

    estimator: str | Estimator
    gamma: float | Sequence[float]
    gamma_unit: str = "token"
    options: Mapping[str, Any] = field(default_factory=dict)
    aggregation: str = "sum_then_normalize"
    scale: str = "group"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        check_choice("gamma_unit", self.gamma_unit, GAMMA_UNITS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("scale", self.scale, SCALES)
        find_estimator(self.estimator).with_options(self.options)

    @property
    def row(self) -> Estimator:
        """The estimator with its options."""
        return find_estimator(self.estimator).with_options(self.options)

    @property
    def std_scale(self) -> str:
        """The scale of the estimator's own normalisation: `"normalize_then_sum"` has no use for the setting."""
        return self.scale if self.aggregation == "sum_then_normalize" else "group"

    @property
    def compares_groups(self) -> bool:
        """Whether a completion's advantages depend on other groups than its own."""
        return self.aggregation == "normalize_then_sum" or self.scale == "batch"

    def gammas(self, num_sources: int) -> list[float]:
        """
        The discount of each source.

        Raises:
            ValueError: another number of gammas than of sources.
        """
        gammas = [self.gamma] * num_sources if isinstance(self.gamma, (int, float)) else list(self.gamma)
        if len(gammas) != num_sources:
            raise ValueError(f"{len(gammas)} gammas for {num_sources} reward sources; give one for all, or one each.")
        return [float(value) for value in gammas]
