"""The part of the trainer that logs credit: when, of which completions, and what the loss sees of them."""

import importlib.util
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from .._swapped import swapped
from ..loss import completion_logps
from ..model_card import ModelCardTrainer
from ..rewards.gating import NO_GATE
from ..rewards.scored_batch import ScoredBatch
from ..rewards.sources import RewardSource
from ..rewards.types import Reward, StepRewards
from .decomposition import Decomposition, decompose
from .log import Recording, completion_row, completion_rows, credit_file, token_texts, write_rows
from .step_table import CompletionSteps, print_steps, step_lines
from .trackers import log_report


logger = logging.get_logger(__name__)

# Key of the batch that says which rows a micro-batch has; TRL shuffles it with the others
_ROWS = "credit_rows"


class CreditTrainer(ModelCardTrainer):
    """
    [`~trl.GRPOTrainer`] that records a few groups of each logged step, if `log_credit` is not 0, and with
    `log_completions` prints the steps of completions.

    Recorded are the first groups of the step's generated batch, and of the first batch of each evaluation. All
    processes come together once, after the first pass over the batch. Steps are printed in place of TRL's table of
    completions, under process supervision, if a source rewards steps.

    Args:
        **kwargs:
            The arguments of [`ModelCardTrainer`], by name.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # By mode: an evaluation may lie between the updates on a batch
        self._recordings: dict[str, Recording] = {}
        self._recorded_step = {"train": -1, "eval": -1}
        # Of the main process, beside its recording: the batch of all processes and its decomposition
        self._recorded_batches: dict[str, tuple[ScoredBatch, Decomposition]] = {}
        self._loss_inputs: Mapping[str, Any] = {}
        # Of the same completions as TRL's `_logs`
        self._logged_steps: deque[CompletionSteps] = deque(maxlen=self._logs["advantages"].maxlen)

    # -----------------------------------------------------------------------------------------------------------------
    # When

    @property
    def _credit_step(self) -> int:
        return self.state.global_step + (self._mode == "train")

    @property
    def _credit_is_due(self) -> bool:
        """Whether the batch that has just been generated is to be recorded."""
        if not self.args.log_credit or self._recorded_step[self._mode] == self._credit_step:
            return False
        if self._mode == "eval":
            return True
        micro_batches = cast(int, self.args.steps_per_generation) * self.num_iterations
        updates = math.ceil(micro_batches / self.args.gradient_accumulation_steps)
        return any(self._is_logged(step) for step in range(self._credit_step, self._credit_step + updates))

    def _is_logged(self, step: int) -> bool:
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    # -----------------------------------------------------------------------------------------------------------------
    # What

    def _record_batch(
        self,
        output: dict[str, Any],
        batch: ScoredBatch,
        completion_ids: list[list[int]],
        judgements_KB: list[list[tuple[Reward, Reward]]],
    ) -> None:
        """
        Begin to record a batch that is scored and has its advantages.

        Args:
            output (`dict[str, Any]`):
                The batch as TRL scored it; gets the numbers of its rows.
            batch ([`~trl_grpo_ext.ScoredBatch`]):
                The completions of all processes.
            completion_ids (`list[list[int]]` of length B):
                This process's completions, without padding.
            judgements_KB (`list[list[tuple]]`):
                Each source's rewards of these, as returned and after its transform.
        """
        count = len(completion_ids)
        first = self.accelerator.process_index * count
        device = output["completion_ids"].device
        output[_ROWS] = torch.arange(first, first + count, device=device)
        recorded = min(self.args.log_credit * batch.group_size, len(batch.mask_NT))
        rows: dict[int, dict[str, Any]] = {
            first + index: self._completion_row(output, index, completion_ids[index], judgements_KB)
            for index in range(min(count, max(recorded - first, 0)))
        }
        passes = cast(int, self.args.steps_per_generation) if self._mode == "train" else 1
        self._recordings[self._mode] = Recording(self._mode, self._credit_step, rows, passes)
        self._recorded_step[self._mode] = self._credit_step
        if self.accelerator.is_main_process:
            self._recorded_batches[self._mode] = self._explained(batch, recorded)

    def _completion_row(
        self,
        output: Mapping[str, Any],
        index: int,
        ids: list[int],
        judgements_KB: list[list[tuple[Reward, Reward]]],
    ) -> dict[str, Any]:
        prompt_ids = output["prompt_ids"][index][output["prompt_mask"][index].bool()].tolist()
        mask = output["completion_mask"][index]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"][index]
        advantages = output["advantages"][index].reshape(-1)[: max(len(ids), 1)].tolist()
        row = completion_row(
            self._tokenizer,
            prompt_ids,
            ids,
            mask[: len(ids)].tolist(),
            advantages,
            [judgements[index] for judgements in judgements_KB],
        )
        ended = bool(ids) and ids[-1] in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        row["truncated"] = len(ids) >= cast(int, self.max_completion_length) and not ended
        return row

    def _explained(self, batch: ScoredBatch, recorded: int) -> tuple[ScoredBatch, Decomposition]:
        """The rows that are recorded, and the sums that make their advantages."""
        settings = self.args.advantage_settings
        if not settings.compares_groups:
            batch = batch._replace(
                rewards_KNT=batch.rewards_KNT[:, :recorded],
                withheld_NK=batch.withheld_NK[:recorded],
                mask_NT=batch.mask_NT[:recorded],
            )
        rewards_KNT = batch.counted_KNT.cpu().double()
        weights_K = self.reward_weights.cpu()
        return batch, decompose(rewards_KNT, batch.mask_NT.cpu(), weights_K, batch.group_size, settings)

    def _compute_loss(self, model, inputs):
        # "sequence_token" has other old log-probs in its copy
        self._loss_inputs = inputs
        return super()._compute_loss(model, inputs)

    def _observe_tokens(self, output: Any, kl_BT: torch.Tensor | None) -> None:
        inputs = self._loss_inputs
        recording = self._recordings.get(self._mode)
        if recording is None or _ROWS not in inputs:
            return
        logps_BT = completion_logps(output, inputs)
        is_exact = self.beta != 0.0 and self.args.kl_estimator == "exact"
        values = {
            "trainer_logprobs": logps_BT,
            "old_logprobs": inputs.get("old_per_token_logps", logps_BT),
            "ref_logprobs": output.ref_log_probs if is_exact else inputs.get("ref_per_token_logps"),
            "inference_logprobs": inputs.get("sampling_per_token_logps"),
            "entropy": output.entropy[:, -logps_BT.size(1) :],
            "kl": kl_BT,
        }
        if recording.observe(inputs[_ROWS], values):
            self._write_credit(self._mode)

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def _write_credit(self, mode: str) -> None:
        """Gather the rows of all processes, and write them in the main one. A full disk does not end the run."""
        recording = self._recordings.pop(mode)
        gathered = cast(list[tuple[int, dict[str, Any]]], gather_object(list(recording.rows.items())))
        if not self.accelerator.is_main_process:
            return
        batch, decomposition = self._recorded_batches.pop(mode)
        rows = completion_rows(
            dict(gathered),
            decomposition,
            batch.counted_KNT,
            batch.withheld_NK,
            self._source_settings(),
            batch.group_size,
        )
        path = credit_file(Path(cast(str, self.args.output_dir)), mode, recording.step)
        try:
            write_rows(path, [{**row, "step": recording.step, "mode": mode} for row in rows], self._credit_settings())
        except OSError as error:
            logger.warning(f"The credit of step {recording.step} is not logged: {error}")

    def _finalize_training(self, trial, *args: Any, **kwargs: Any) -> Any:
        # Not in a callback: those of trackers end their runs in `on_train_end`, before any that is added later
        if "train" in self._recordings:
            # Of a batch whose updates the end of training cuts short
            self._write_credit("train")
        if self.args.log_credit and self.accelerator.is_main_process:
            log_report(Path(cast(str, self.args.output_dir)), self.state, cast(list[str], self.args.report_to))
        return super()._finalize_training(trial, *args, **kwargs)

    def _source_settings(self) -> list[dict[str, Any]]:
        names = self.reward_func_names
        columns = {
            "name": names,
            "weight": self.reward_weights.tolist(),
            "gamma": self.args.advantage_settings.gammas(len(names)),
            "transform": self.args.reward_transforms or ["none"] * len(names),
            "gate": self.args.outcome_gate or [NO_GATE] * len(names),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _credit_settings(self) -> dict[str, Any]:
        settings = self.args.advantage_settings
        return {
            "supervision": self.args.supervision,
            "advantage_estimator": settings.estimator,
            "normalizes": settings.row.normalizes,
            "options": settings.options,
            "gamma_unit": settings.gamma_unit,
            "multi_objective_aggregation": settings.aggregation,
            "scale_rewards": settings.scale,
            "advantage_eps": settings.eps,
            "kl_estimator": self.args.kl_estimator,
            "kl_direction": self.args.kl_direction,
            "beta": self.beta,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # In the terminal

    def _log_steps(
        self,
        advantages: torch.Tensor,
        mask_BT: torch.Tensor,
        batch: ScoredBatch,
        completion_ids: list[list[int]],
        sources: Sequence[Any],
    ) -> None:
        """
        Keep what the table of steps prints of a batch, as TRL keeps its completions.

        Args:
            advantages (`torch.Tensor` of shape `(B, T)`):
                Of this process's completions.
            mask_BT (`torch.Tensor` of shape `(B, T)`):
                Their loss mask.
            batch ([`~trl_grpo_ext.ScoredBatch`]):
                The completions of all processes.
            completion_ids (`list[list[int]]` of length B):
                This process's completions, without padding.
            sources (`Sequence` of length K):
                [`RewardSource`] of each function, which remembers its steps.
        """
        if not self.log_completions or self.args.supervision == "outcome":
            return
        rewards_BKT = batch.counted_KNT[:, batch.own_rows].transpose(0, 1).tolist()
        judged = [source.rewards for source in sources if isinstance(source, RewardSource)]
        completions = []
        for row, ids in enumerate(completion_ids):
            ends = step_ends([rewards[row] for rewards in judged], len(ids))
            texts = token_texts(self._tokenizer, ids)
            mask = mask_BT[row, : len(ids)].tolist()
            lines = step_lines(texts, ends, mask, advantages[row, : len(ids)].tolist(), rewards_BKT[row])
            completions.append(CompletionSteps(lines, bool(ends)))
        self._logged_steps.extend(gather_object(completions))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with a table of steps in place of its table of completions where there are steps."""
        if not any(completion.has_steps for completion in self._logged_steps):
            super().log(logs, start_time)
            return
        # With none to print, TRL logs all but its table
        with swapped(self, num_completions_to_print=0):
            super().log(logs, start_time)
        # TRL, too, does without a table where rich is not installed
        if self.accelerator.is_main_process and importlib.util.find_spec("rich") is not None:
            print_steps(self._logs, self._logged_steps, self.state.global_step, self.num_completions_to_print)


def step_ends(rewards_K: Sequence[Reward], length: int) -> set[int]:
    """The last tokens of the steps that sources have found in a completion; one that rewards each token finds none."""
    found = [reward.ends for reward in rewards_K if isinstance(reward, StepRewards) and len(reward.ends) < length]
    return {end for ends in found for end in ends}


def judgements_of(source: Any, returned_B: torch.Tensor, scores_B: torch.Tensor) -> list[tuple[Reward, Reward]]:
    """
    A source's rewards of this process's completions, as returned and after its transform.

    Args:
        source ([`RewardSource`] or `nn.Module`):
            A function's source, which remembers both; of a sequence classifier they are scores.
        returned_B (`torch.Tensor` of shape `(B,)`):
            A classifier's scores before its transform.
        scores_B (`torch.Tensor` of shape `(B,)`):
            The same after it.
    """
    if isinstance(source, RewardSource):
        return list(zip(source.returned, source.rewards, strict=True))
    assert isinstance(source, nn.Module)
    pairs = zip(returned_B.tolist(), scores_B.tolist(), strict=True)
    return [(None, None) if math.isnan(returned) else (returned, score) for returned, score in pairs]
