"""The part of the trainer that scores completions: what each source gives, and the batch that is made of it."""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.utils import logging

from ._swapped import swapped
from .config import GRPOExtConfig
from .credit.trainer import CreditTrainer
from .metrics import (
    RewardStats,
    TurnStats,
    outcome_correlations,
    reward_stats,
    step_metrics,
    step_shares,
    turn_metrics,
    turn_stats,
    unjudged_shares,
    withheld_shares,
)
from .reward_models.opening import prepare_reward_sources
from .reward_models.progress import progress_bars
from .rewards.arguments import check_tool_mask
from .rewards.gating import NO_GATE, gate_indices, withheld_rewards
from .rewards.scored_batch import ScoredBatch, count_steps, outcome_rewards, share_of, token_rewards
from .rewards.sources import RewardSource, StepCounts, parse_model_scores, wrap_source
from .rewards.step_warnings import StepWarnings
from .rewards.types import plain
from .rewards.weights import parse_weight


logger = logging.get_logger(__name__)


class _Scored(NamedTuple):
    """
    What `_calculate_rewards` leaves of a batch.

    Args:
        sources (`list` of length K):
            The wrapped sources, which hold the rewards of tokens and steps.
        scores_NK (`torch.Tensor` of shape `(N, K)`):
            One number per completion and source, NaN where there is none.
        withheld_NK (`torch.Tensor` of shape `(N, K)`, bool):
            Where a gate keeps it from counting.
        returned_NK (`torch.Tensor` of shape `(N, K)`):
            The scores of sequence classifiers before their transforms.
        completion_ids (`list[list[int]]` of length B):
            The completions of this process, without padding.
    """

    sources: list[Any]
    scores_NK: torch.Tensor
    withheld_NK: torch.Tensor
    returned_NK: torch.Tensor
    completion_ids: list[list[int]]

    @property
    def counted_NK(self) -> torch.Tensor:
        """The scores with NaN in place of what is withheld, as TRL is to see them."""
        return self.scores_NK.masked_fill(self.withheld_NK, torch.nan)


class ScoringTrainer(CreditTrainer):
    """
    [`~trl.GRPOTrainer`] whose reward sources may give rewards to tokens, with gates, transforms and scheduled weights.

    Args:
        **kwargs:
            The arguments of [`CreditTrainer`], by name.
    """

    def __init__(self, *, args: GRPOExtConfig, **kwargs: Any):
        self._weights = [parse_weight(weight) for weight in cast(list[Any], args.reward_weights or [])]
        # TRL takes numbers; the config keeps what it was given
        numbers = None if args.reward_weights is None else [weight.first for weight in self._weights]
        with swapped(args, reward_weights=numbers):
            super().__init__(args=args, **kwargs)

    def _set_up_rewards(self) -> None:
        names = self.reward_func_names
        self.args.check_sources(names)
        self._transforms = self.args.reward_transforms or ["none"] * len(names)
        self._gates = gate_indices(self.args.outcome_gate or [NO_GATE] * len(names), names)
        self._step_warnings = StepWarnings(self.args.supervision == "outcome")
        # Of the batch that is being scored
        self._tool_mask: list[list[int]] | None = None
        self._prompt_ids: list[list[int]] | None = None
        self._scored: _Scored | None = None
        self._first_completion = ""
        self._prepare_sources()
        # A `reduce` that does not exist is known now
        self._wrap_sources()

    def _prepare_sources(self) -> None:
        self.reward_funcs = prepare_reward_sources(
            self.reward_funcs,
            accelerator=self.accelerator,
            policy_tokenizer=self._tokenizer,
            batch_tokens=self.args.reward_batch_tokens,
        )

    def _wrap_sources(self) -> list[Any]:
        """The user's functions as TRL is to call them in the next batch; models as they are."""
        is_outcome = self.args.supervision == "outcome"
        sources = zip(self.reward_funcs, self.reward_func_names, self._transforms, strict=True)
        return [
            source
            if isinstance(source, nn.Module)
            else wrap_source(source, name, transform, is_outcome, self._tool_mask, self._prompt_ids)
            for source, name, transform in sources
        ]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # Another trainer with the same source may have prepared it since, for another tokenizer
        self._prepare_sources()
        sources = self._wrap_sources()
        is_outcome = self.args.supervision == "outcome"
        shows_bars = self.accelerator.is_main_process and not self.args.disable_tqdm
        # `reward_funcs` holds the user's own functions at any other time
        with swapped(self, reward_funcs=sources), progress_bars(shown=shows_bars):
            scores_NK = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        returned_NK = scores_NK.clone()
        for k, source in enumerate(sources):
            if isinstance(source, nn.Module):
                name = self.reward_func_names[k]
                scores_NK[:, k] = parse_model_scores(scores_NK[:, k], name, self._transforms[k], is_outcome)
        withheld_NK = withheld_rewards(scores_NK, self._gates)
        self._scored = _Scored(sources, scores_NK, withheld_NK, returned_NK, completion_ids_list)
        self._first_completion = str(completions[0])
        return self._scored.counted_NK

    def _follow_schedules(self) -> None:
        """Set the weights that change, and log all of them; a function of the step, so that a resumed run goes on."""
        if not any(weight.changes for weight in self._weights):
            return
        # Before training there is no last step
        progress = self.state.global_step / max(self.state.max_steps, 1)
        for k, weight in enumerate(self._weights):
            if weight.changes:
                self.reward_weights[k] = weight.at(progress)
        weights = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        self._record({f"rewards/{name}/weight": weight for name, weight in weights})

    def _follow_subclass(self, rewards_NK: torch.Tensor) -> None:
        """
        Go on with what a subclass has made of the rewards that `_calculate_rewards` returns here.

        Raises:
            RuntimeError: under process supervision, where the rewards of tokens are trained on.
        """
        if self._scored is None:
            return
        counted_NK = self._scored.counted_NK
        if ((rewards_NK == counted_NK) | (rewards_NK.isnan() & counted_NK.isnan())).all():
            return
        if self.args.supervision == "process":
            raise RuntimeError(
                f"{type(self).__name__}._calculate_rewards changes what super()._calculate_rewards(...) returns, one "
                "number for each completion, and supervision='process' trains on the rewards of tokens. Change the "
                "reward function, or override compute_advantages(batch), whose batch has them."
            )
        self._scored = self._scored._replace(
            scores_NK=rewards_NK, withheld_NK=withheld_rewards(rewards_NK, self._gates)
        )

    def _warn_of_steps(self, sources: list[Any], counts_K: list[StepCounts], completions: int) -> None:
        """Say once, by name, where the steps of a source look wrong; see [`StepWarnings`]."""
        for source, counts in zip(sources, counts_K, strict=True):
            if isinstance(source, RewardSource):
                warning = self._step_warnings.of_batch(source, counts, completions, self._first_completion)
                if warning is not None and self.accelerator.is_main_process:
                    logger.warning(warning)

    def _scored_batch(self, mask_BT: torch.Tensor, is_whole: bool) -> ScoredBatch:
        """
        What completions earn, from the rewards that TRL has just collected.

        Args:
            mask_BT (`torch.Tensor` of shape `(B, T)`):
                Loss mask of this process.
            is_whole (`bool`):
                Whether the completions of all processes are needed, rather than those of this process's groups.
        """
        assert self._scored is not None
        sources, scores_NK, withheld_NK, *_ = self._scored
        group_size = cast(int, self.num_generations if self._mode == "train" else self.num_generations_eval)
        needed = len(scores_NK) if is_whole else group_size
        if self.args.supervision == "process":
            rewards = token_rewards(self.accelerator, sources, scores_NK, mask_BT, needed)
        else:
            rewards = outcome_rewards(scores_NK)
        own_rows, share = share_of(self.accelerator, rewards.rows, len(scores_NK), needed)
        counts_K = count_steps(self.accelerator, sources)
        self._warn_of_steps(sources, counts_K, len(scores_NK))
        return ScoredBatch(
            names=self.reward_func_names,
            rewards_KNT=rewards.rewards_KNT,
            withheld_NK=withheld_NK[rewards.rows.start : rewards.rows.stop],
            mask_NT=rewards.mask_NT,
            steps_K=[counts.steps for counts in counts_K],
            unscored_K=[counts.unscored for counts in counts_K],
            masked_K=rewards.masked_K,
            group_size=group_size,
            own_rows=own_rows,
            share=share,
        )

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, _, _, extra_fields, *_ = generated
        check_tool_mask(tool_mask, completion_ids, extra_fields)
        # A rollout function may return tensors
        self._tool_mask = plain(tool_mask)
        self._prompt_ids = plain(prompt_ids)
        return generated

    def reward_metrics(self, batch: ScoredBatch) -> dict[str, float]:
        """
        Metrics of a scored batch, logged beside TRL's under the same names on every process.

        A subclass may override it:

        ```python
        >>> class JudgedTrainer(GRPOExtTrainer):
        ...     def reward_metrics(self, batch):
        ...         judged = 1 - batch.unjudged_NK.all(1).double().mean().item()
        ...         return {**super().reward_metrics(batch), "rewards/judged": judged}
        ```

        Under outcome supervision the batch has one column, so its mask says nothing of lengths.

        Args:
            batch ([`~trl_grpo_ext.ScoredBatch`]):
                Completions and their rewards: those of all processes, the same on every process, if this method or
                [`~trl_grpo_ext.GRPOExtTrainer.compute_advantages`] is overridden.

        Returns:
            `dict[str, float]`: a metric that is NaN is left out of the log.
        """
        stats = RewardStats(*[batch.share.of_all(one) for one in reward_stats(batch.rewards_KNT, batch.mask_NT)])
        unjudged_NK = stats.count_NK == 0
        metrics = step_shares("unscored", batch.names, batch.unscored_K, batch.steps_K)
        metrics |= unjudged_shares(batch.names, unjudged_NK)
        if self.args.outcome_gate:
            metrics |= withheld_shares(batch.names, unjudged_NK, batch.share.of_all(batch.withheld_NK))
        if self.args.supervision == "process":
            metrics |= step_shares("masked", batch.names, batch.masked_K, batch.steps_K)
            has_steps_K = [steps > 0 for steps in batch.steps_K]
            # Of an outcome source TRL logs mean and std, and the number of its steps is always 1
            metrics |= step_metrics(batch.names, stats, has_steps_K)
            # In every batch with tools, called or not: the log is a mean over batches
            if self._tool_mask is not None:
                turns = TurnStats(*[batch.share.of_all(one) for one in turn_stats(batch.rewards_KNT, batch.mask_NT)])
                metrics |= turn_metrics(batch.names, turns, has_steps_K)
            metrics |= outcome_correlations(batch.names, stats.scores_KN, has_steps_K, batch.group_size)
        return metrics
