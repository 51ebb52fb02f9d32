"""The trainer: TRL's, with our advantages in the batch and our KL in the loss."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.utils import logging

from ._swapped import swapped
from ._trl import ADVANTAGE_EPS, GRPOTrainer, get_config_model_id
from .advantages.combine import check_values, process_advantages
from .config import GRPOExtConfig
from .credit.trainer import CreditTrainer, judgements_of
from .distributed import gather, local_rows, total
from .kl.trainer import KLTrainer
from .loss import loss_mask
from .metrics import (
    RewardStats,
    TurnStats,
    as_numbers,
    completion_means,
    outcome_correlations,
    positive_counts,
    reward_stats,
    step_metrics,
    step_shares,
    turn_metrics,
    turn_stats,
    turn_sums,
    unjudged_shares,
    withheld_shares,
)
from .reward_models.opening import open_reward_models, prepare_reward_sources
from .reward_models.progress import progress_bars
from .rewards.arguments import (
    check_columns,
    check_row,
    check_source_columns,
    check_tool_mask,
    list_sources,
)
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


class GRPOExtTrainer(CreditTrainer):
    """
    [`~trl.GRPOTrainer`] with process supervision, several weighted reward sources at token level and an exact KL.

    Takes the same arguments; `args` is a [`GRPOExtConfig`]. With its new fields at their defaults, training is TRL's.
    A reward function may return, for each completion, a float, a list of floats as long as `completion_ids`,
    [`StepRewards`], or `None`. With [`~trl_grpo_ext.step_reward`] a function judges the texts of a completion's steps.

    A subclass may override three methods: [`~GRPOExtTrainer.compute_advantages`], [`~GRPOExtTrainer.per_token_kl`] and
    [`~GRPOExtTrainer.reward_metrics`]. Each has an example in its docstring.

    Example:

    ```python
    >>> from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, step_reward

    >>> @step_reward(by="blank_line")
    ... def judge_steps(problem, steps, **columns):
    ...     return [float("=" in step) for step in steps]

    >>> trainer = GRPOExtTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=[judge_steps],
    ...     args=GRPOExtConfig(supervision="process", beta=0.01, kl_estimator="exact"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Raises:
        TypeError: `args` is not a [`GRPOExtConfig`].
        ValueError: a number of weights, gammas or transforms that differs from the number of reward sources, or a
            combination that is not supported, with the reason.
    """

    _tag_names = [*GRPOTrainer._tag_names, "trl-grpo-ext"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOExtConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: (
            Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
        ) = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOExtConfig(f"{model_name.split('/')[-1]}-GRPO")
        if not isinstance(args, GRPOExtConfig):
            raise TypeError(
                f"args must be a GRPOExtConfig, not {type(args).__name__}; the fields of GRPOConfig carry over."
            )
        args.has_its_trainer = True
        _check_loss_bodies(type(self), args)
        self._needs_prompt = environment_factory is None
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_columns(datasets, self._needs_prompt)
        self._weights = [parse_weight(weight) for weight in cast(list[Any], args.reward_weights or [])]
        # TRL takes numbers; the config keeps what it was given
        numbers = None if args.reward_weights is None else [weight.first for weight in self._weights]
        with swapped(args, reward_weights=numbers):
            super().__init__(
                model=model,
                reward_funcs=_open_sources(reward_funcs, args),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        _check_trains(cast(nn.Module, self.model))
        self._check_eos_token()
        self._separator_ids = self._tokenize_separator()
        # A rollout function may bring more columns
        if rollout_func is None:
            check_source_columns(self.reward_funcs, self.reward_func_names, datasets)
        self._set_up_rewards()

    # -----------------------------------------------------------------------------------------------------------------
    # Prompts

    def _check_eos_token(self) -> None:
        """Raise `ValueError` if nothing would end a completion, or pad it: TRL pads with the eos token if need be."""
        generates = not self.args.use_vllm and self.rollout_func is None
        if self._tokenizer.eos_token_id is None and (generates or self._tokenizer.pad_token_id is None):
            raise ValueError(
                "the tokenizer has no eos token, with which a completion ends. Set `processing_class.eos_token`, and "
                "`pad_token` if padding is to be another one."
            )

    def _tokenize_separator(self) -> list[int]:
        separator = self.args.prompt_separator
        if separator is None:
            return []
        if self._is_vlm or self.rollout_func is not None:
            culprit = "a vision-language model" if self._is_vlm else "rollout_func"
            raise ValueError(
                f"prompt_separator does not work with {culprit}, which tokenizes prompts by itself; write the "
                "separator into the prompts instead."
            )
        ids = self._tokenizer(separator, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_separator {separator!r} has no tokens in this tokenizer.")
        return ids

    def _tokenize_prompts(self, prompts: list) -> tuple[list, Any, dict]:
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        return [[*ids, *self._separator_ids] for ids in prompt_ids], images, multimodal_fields

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, _, _, extra_fields, *_ = generated
        check_tool_mask(tool_mask, completion_ids, extra_fields)
        # A rollout function may return tensors
        self._tool_mask = plain(tool_mask)
        self._prompt_ids = plain(prompt_ids)
        return generated

    # -----------------------------------------------------------------------------------------------------------------
    # Rewards

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

    def _scored_batch(self, mask_BT: torch.Tensor) -> ScoredBatch:
        """What completions earn, from the rewards that TRL has just collected."""
        assert self._scored is not None
        sources, scores_NK, withheld_NK, *_ = self._scored
        group_size = cast(int, self.num_generations if self._mode == "train" else self.num_generations_eval)
        needed = len(scores_NK) if self._needs_whole_batch else group_size
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

    @property
    def _needs_whole_batch(self) -> bool:
        """Whether each process needs the completions of all processes: what is not ours may compare any of them."""
        of_subclass = (
            type(self).compute_advantages is not GRPOExtTrainer.compute_advantages
            or type(self).reward_metrics is not GRPOExtTrainer.reward_metrics
        )
        # Under outcome supervision all of them are one column
        is_outcome = self.args.supervision == "outcome"
        return is_outcome or of_subclass or self._credit_is_due or not self.args.advantage_settings.row.compares

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
                The completions of all processes and their rewards, the same on every process.

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

    # -----------------------------------------------------------------------------------------------------------------
    # Advantages

    def compute_advantages(self, batch: ScoredBatch) -> torch.Tensor:
        """
        Advantages of all processes' completions, computed alike on every process.

        A subclass may override it:

        ```python
        >>> class ClippedAdvantages(GRPOExtTrainer):
        ...     def compute_advantages(self, batch):
        ...         return super().compute_advantages(batch).clamp(-5.0, 5.0)
        ```

        Args:
            batch ([`~trl_grpo_ext.ScoredBatch`]):
                The completions of all processes and their rewards. `batch.counted_KNT` holds the rewards that count.

        Returns:
            `torch.Tensor` of shape `(N, T)`: advantages, 0 outside the loss mask; T is 1 under outcome supervision,
            where a completion has one advantage.
        """
        rewards_KNT = batch.counted_KNT
        return process_advantages(
            rewards_KNT,
            batch.mask_NT,
            self.reward_weights.to(rewards_KNT.device),
            batch.group_size,
            self.args.advantage_settings,
            share=batch.share,
            # Apple's GPUs have no float64
            dtype=torch.float32 if rewards_KNT.device.type == "mps" else torch.float64,
        )

    @property
    def _keeps_trl_advantages(self) -> bool:
        """Whether the advantages that TRL has computed are those that are asked for."""
        return (
            self.args.supervision == "outcome"
            and self.args.advantage_eps == ADVANTAGE_EPS
            and type(self).compute_advantages is GRPOExtTrainer.compute_advantages
        )

    def _generate_and_score_completions(self, inputs):
        self._follow_schedules()
        # Streamed data tells its columns only now
        check_row("the data set", next(iter(inputs)), self._needs_prompt)
        compute_rewards = self._calculate_rewards

        def observed_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
            rewards_NK = compute_rewards(*args, **kwargs)
            self._follow_subclass(rewards_NK)
            return rewards_NK

        with swapped(self, _calculate_rewards=observed_rewards):
            output = super()._generate_and_score_completions(inputs)
        mask_BT = loss_mask(output)
        if self._scored is None:
            self._require_super()
        else:
            batch = self._scored_batch(mask_BT)
            self._use_rewards(output, batch, mask_BT)
            if self._credit_is_due:
                self._record_scored(output, batch)
            self._log_steps(output["advantages"], mask_BT, batch, self._scored.completion_ids, self._scored.sources)
            self._scored = None
        self._log_advantages(output["advantages"], mask_BT)
        return output

    def _require_super(self) -> None:
        """A subclass may compute rewards as TRL does, but then nothing is known of steps, gates and transforms."""
        needs_steps = self.args.supervision == "process" or not self._keeps_trl_advantages
        if needs_steps or self.args.outcome_gate or self.args.reward_transforms:
            raise RuntimeError(
                f"{type(self).__name__}._calculate_rewards does not call super()._calculate_rewards(...), where the "
                "rewards of tokens and steps, gates and transforms are read. Call it; or use "
                "supervision='outcome' without gates and transforms."
            )

    def _use_rewards(self, output: dict[str, Any], batch: ScoredBatch, mask_BT: torch.Tensor) -> None:
        """Log the batch's metrics, and put the advantages that are asked for in place of TRL's."""
        metrics = as_numbers(self.reward_metrics(batch))
        # A metric without a value would be None in the log, of which trackers complain
        self._record({name: value for name, value in metrics.items() if not math.isnan(value)})
        if self._keeps_trl_advantages:
            return
        advantages_NT = self.compute_advantages(batch)
        name = f"{type(self).__name__}.compute_advantages"
        check_values(name, advantages_NT, torch.ones_like(batch.mask_NT, dtype=torch.bool))
        # Other processes may have longer completions
        advantages_BT = advantages_NT[batch.own_rows, : mask_BT.size(1)].float()
        output["advantages"] = advantages_BT if self.args.supervision == "process" else advantages_BT.squeeze(-1)

    def _record_scored(self, output: dict[str, Any], batch: ScoredBatch) -> None:
        assert self._scored is not None
        sources, scores_NK, _, returned_NK, completion_ids = self._scored
        returned_KB = local_rows(self.accelerator, returned_NK).T
        scores_KB = local_rows(self.accelerator, scores_NK).T
        judgements_KB = [judgements_of(*judged) for judged in zip(sources, returned_KB, scores_KB, strict=True)]
        self._record_batch(output, batch, completion_ids, judgements_KB)

    def _log_advantages(self, advantages: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Log the advantages that are trained on; in the completions table, each completion's mean."""
        means = gather(self.accelerator, completion_means(advantages, mask_BT)).tolist()
        logged = self._logs["advantages"]
        for _ in range(min(len(means), len(logged))):
            logged.pop()
        logged.extend(means)
        positive, counted = total(self.accelerator, positive_counts(advantages, mask_BT))
        self._record({"advantages/positive_share": positive / max(counted, 1.0)})
        # Under outcome supervision all turns of a completion have the same
        if advantages.ndim == 2 and self._tool_mask is not None:
            sums = total(self.accelerator, turn_sums(advantages, mask_BT))
            turns = [(turn, value / tokens) for turn, (value, tokens) in enumerate(sums, 1) if tokens]
            self._record({f"advantages/turn_{turn}": mean for turn, mean in turns})


def _open_sources(reward_funcs: Any, args: GRPOExtConfig) -> list[Any] | None:
    """The sources as a list of our own, in which known reward models stand in place of their ids."""
    if reward_funcs is None:
        return None
    init_kwargs = cast(dict[str, Any], args.model_init_kwargs or {})
    return open_reward_models(list_sources(reward_funcs), {"trust_remote_code": args.trust_remote_code, **init_kwargs})


def _check_loss_bodies(trainer_class: type, args: GRPOExtConfig) -> None:
    """
    Refuse another trainer's loss where it would not read what this package puts into the batch.

    Raises:
        ValueError: a base class beside this one, such as TRL's `GMPOTrainer`, has a loss of its own.
    """
    if args.supervision == "outcome" and args.uses_trl_kl:
        return
    for base in trainer_class.__mro__:
        foreign = issubclass(base, GRPOTrainer) and base is not GRPOTrainer and not issubclass(base, KLTrainer)
        if foreign and "_compute_loss" in base.__dict__:
            raise ValueError(
                f"{trainer_class.__name__} takes its loss from {base.__name__}, which reads one advantage per "
                "completion and has a KL of its own. Use supervision='outcome' with the default KL, or GRPO's loss."
            )


def _check_trains(model: nn.Module) -> None:
    """Raise `ValueError` if no parameter of the model trains."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no trainable parameter. PEFT loads an adapter frozen: "
            "PeftModel.from_pretrained(..., is_trainable=True); and merge_and_unload() leaves the base model frozen: "
            "model.requires_grad_(True), or pass a peft_config."
        )
