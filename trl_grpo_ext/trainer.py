"""The trainer: TRL's, with our advantages in the batch and our KL in the loss."""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

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

from ._swapped import swapped
from ._trl import ADVANTAGE_EPS, GRPOTrainer, get_config_model_id
from .advantages.combine import check_values, process_advantages
from .config import GRPOExtConfig
from .credit.trainer import judgements_of
from .distributed import gather, local_rows, total
from .kl.trainer import KLTrainer
from .loss import loss_mask
from .metrics import as_numbers, completion_means, positive_counts, turn_sums
from .reward_models.opening import open_reward_models
from .rewards.arguments import check_columns, check_row, check_source_columns, list_sources
from .rewards.scored_batch import ScoredBatch
from .scoring import ScoringTrainer


class GRPOExtTrainer(ScoringTrainer):
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

    # -----------------------------------------------------------------------------------------------------------------
    # Advantages

    @property
    def _needs_whole_batch(self) -> bool:
        """Whether each process needs the completions of all processes, rather than those of its own groups."""
        # What is not ours may compare any completions with each other. It may stand in a subclass or on this trainer
        of_override = self.compute_advantages != MethodType(
            GRPOExtTrainer.compute_advantages, self
        ) or self.reward_metrics != MethodType(GRPOExtTrainer.reward_metrics, self)
        # Under outcome supervision all of them are one column
        is_outcome = self.args.supervision == "outcome"
        of_estimator = not self.args.advantage_settings.row.compares
        # The main process records groups that may lie in others
        return is_outcome or of_override or of_estimator or self._credit_is_due

    def compute_advantages(self, batch: ScoredBatch) -> torch.Tensor:
        """
        Advantages of the batch's completions, of which this process trains on its own.

        A subclass may override it:

        ```python
        >>> class ClippedAdvantages(GRPOExtTrainer):
        ...     def compute_advantages(self, batch):
        ...         return super().compute_advantages(batch).clamp(-5.0, 5.0)
        ```

        Args:
            batch ([`~trl_grpo_ext.ScoredBatch`]):
                Completions and their rewards: those of all processes, the same on every process, if this method or
                [`~GRPOExtTrainer.reward_metrics`] is overridden. Otherwise they may be those of this process's groups
                alone. `batch.counted_KNT` holds the rewards that count.

        Returns:
            `torch.Tensor` of shape `(N, T)`: advantages of all of these completions, 0 outside the loss mask; T is 1
            under outcome supervision, where a completion has one advantage.
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
            and self.compute_advantages == MethodType(GRPOExtTrainer.compute_advantages, self)
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
            batch = self._scored_batch(mask_BT, self._needs_whole_batch)
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
