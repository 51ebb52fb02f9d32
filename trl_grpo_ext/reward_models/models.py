"""Process and outcome reward models: usable by themselves and as reward functions."""

import math
import os
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Self

from accelerate import Accelerator

from ..rewards.types import StepRewards
from ..steps.alignment import align_tokens
from ..steps.policy_text import assistant_text, last_user_text, place_on_tokens, policy_steps, policy_texts
from ..steps.segmentation import SegmentationLike, as_segmentation, segment, split_text
from .backbone import Scorer
from .base import RewardModel
from .checkpoint import Checkpoint
from .encoding import encode_text
from .preset import Preset
from .self_check import BAD_STEPS, CORRUPTED, GOOD_STEPS, PROBLEM, check_order
from .texts import check_texts


class ProcessRewardModel(RewardModel):
    """
    A process reward model: one score for each step of a solution.

    It can be used by itself, and as a reward function of [`GRPOExtTrainer`]. There each score is placed on the last
    token of its step.

    Args:
        scorer, tokenizer, preset, name, max_length:
            As in [`RewardModel`]; [`~RewardModel.from_pretrained`] loads them.
        segmentation ([`Segmentation`] or its argument `by`, *optional*):
            How completions are split, and which part of them is judged; the preset's by default.
        policy_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the policy, which decodes `completion_ids`. The trainer sets it.

    What is out of the segmentation's scope is no part of the model's input. So with `scope="answer"` thinking takes
    none of the positions that the steps of the answer need.

    Example:

    ```python
    >>> prm = ProcessRewardModel.from_pretrained("Qwen/Qwen2.5-Math-PRM-7B", dtype="bfloat16")
    >>> # One list for each solution, one score in [0, 1] for each of its steps
    >>> prm.score("What is 2 + 3 * 4?", ["3 * 4 = 12\n\n2 + 12 = 14", "2 + 3 = 5\n\n5 * 4 = 20"])
    ```
    """

    kind = "process"

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        preset: Preset,
        name: str,
        max_length: int | None = None,
        segmentation: SegmentationLike | None = None,
        policy_tokenizer: Any = None,
    ):
        super().__init__(scorer, tokenizer, preset, name, max_length)
        self.segmentation = preset.segmentation if segmentation is None else as_segmentation(segmentation)
        self.policy_tokenizer = policy_tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model: "str | os.PathLike[str] | Checkpoint",
        *,
        segmentation: SegmentationLike | None = None,
        **options: Any,
    ) -> Self:
        """[`RewardModel.from_pretrained`], and `segmentation`: how completions are split, instead of the preset's."""
        # Before the weights are loaded, which takes longer
        chosen = None if segmentation is None else as_segmentation(segmentation)
        reward_model = super().from_pretrained(model, **options)
        if chosen is not None:
            reward_model.segmentation = chosen
        return reward_model

    def inputs_key(self) -> tuple[Any, ...]:
        """[`RewardModel.inputs_key`], and how completions are split."""
        return *super().inputs_key(), self.segmentation, self.policy_tokenizer

    def prepare(self, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """[`RewardModel.prepare`], and the tokenizer of the policy whose `completion_ids` will come."""
        super().prepare(accelerator, policy_tokenizer, batch_tokens)
        self.policy_tokenizer = policy_tokenizer

    def score_steps(self, problems: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """
        Scores of steps that are already split.

        Args:
            problems (`Sequence[str]`):
                The problem of each solution.
            steps (`Sequence[Sequence[str]]`):
                The steps of each solution.

        Returns:
            `list[list[float | None]]`: as many as there are steps; `None` for those that did not fit into
            `max_length`, which are the last ones.

        Raises:
            TypeError: a text where a list of steps or of problems belongs.
            ValueError: an empty step, or another number of problems than of solutions.
        """
        check_texts(problems, "problems")
        if len(problems) != len(steps):
            raise ValueError(f"{len(problems)} problems for {len(steps)} solutions.")
        for index, own in enumerate(steps):
            if isinstance(own, str):
                raise TypeError(f"solution {index} is a text, {own!r}; give its steps as a list, or use `score`.")
            for number, step in enumerate(own):
                if not step.strip():
                    raise ValueError(f"solution {index}: step {number} is empty.")
        solutions = [self._render(problem, own) for problem, own in zip(problems, steps, strict=True)]
        scores = []
        for own, values in zip(steps, self._score(solutions), strict=True):
            scores.append([*values, *[None] * (len(own) - len(values))])
        return scores

    def split(self, solution: str) -> list[str]:
        """Steps of a solution that is text, by `segmentation` and in its scope; tokens are the reward model's."""
        own = self.segmentation
        if own.by != "tokens" and own.min_step_tokens == 1 and own.max_steps is None:
            parts = [solution[start:end] for start, end in own.in_scope(solution)]
            return [part[start:end].strip() for part in parts for start, end in split_text(part, own)]
        aligned = align_tokens(self.tokenizer, encode_text(self.tokenizer, solution))
        return [step.text for step in segment(aligned, own)]

    def score(self, problem: str, solutions: Sequence[str]) -> list[list[float | None]]:
        """
        Scores of the steps of solutions to one problem.

        Args:
            problem (`str`):
                The problem.
            solutions (`Sequence[str]`):
                The solutions, which [`~ProcessRewardModel.split`] cuts into steps.

        Returns:
            `list[list[float | None]]`: as [`~ProcessRewardModel.score_steps`].
        """
        check_texts(solutions, "solutions")
        return self.score_steps([problem] * len(solutions), [self.split(solution) for solution in solutions])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[StepRewards | None]:
        """
        TRL's call of a reward function: scores on the policy's tokens, `None` for steps that did not fit.

        The outputs of tools are not read: the solution is what the policy wrote, its turns one after the other.
        """
        source = f"process reward model '{self.name}'"
        steps = policy_steps(
            self.policy_tokenizer, completion_ids, tool_mask, self.segmentation, source, prompts, prompt_ids
        )
        problems = [last_user_text(prompt) for prompt in prompts]
        scores = self.score_steps(problems, [[step.text for step in own] for own in steps])
        return [place_on_tokens(own, values) for own, values in zip(steps, scores, strict=True)]

    def self_check(self) -> None:
        """
        Score a right and a corrupted solution.

        Raises:
            ValueError: the corrupted step and those after it do not score lower, on average.
        """
        good, bad = self.score_steps([PROBLEM] * 2, [GOOD_STEPS, BAD_STEPS])
        check_order(self, good=_mean_from_corrupted(good), bad=_mean_from_corrupted(bad), shown=f"{good} and {bad}")


def _mean_from_corrupted(scores: Sequence[float | None]) -> float:
    """Mean score of the steps from the corrupted one on, NaN if one of them is not scored."""
    return fmean(math.nan if score is None else score for score in scores[CORRUPTED:])


class OutcomeRewardModel(RewardModel):
    """
    An outcome reward model: one number for each solution.

    It can be used by itself, and as a reward function of [`GRPOExtTrainer`].

    Example:

    ```python
    >>> orm = OutcomeRewardModel.from_pretrained("nvidia/AceMath-7B-RM", dtype="bfloat16")
    >>> # One number for each solution
    >>> orm.score("What is 2 + 3 * 4?", ["2 + 12 = 14", "5 * 4 = 20"])
    ```
    """

    kind = "outcome"

    def score_batch(self, problems: Sequence[str], solutions: Sequence[str]) -> list[float | None]:
        """
        Scores of solutions to several problems.

        Args:
            problems (`Sequence[str]`):
                The problem of each solution.
            solutions (`Sequence[str]`):
                The solutions.

        Returns:
            `list[float | None]`: one number for each solution; `None` for one that does not fit into `max_length`.
        """
        check_texts(problems, "problems")
        check_texts(solutions, "solutions")
        pairs = zip(problems, solutions, strict=True)
        scores = self._score([self._render(problem, [solution]) for problem, solution in pairs])
        return [values[0] if values else None for values in scores]

    def score(self, problem: str, solutions: Sequence[str]) -> list[float | None]:
        """One number for each solution to one problem."""
        check_texts(solutions, "solutions")
        return self.score_batch([problem] * len(solutions), solutions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's call of a reward function."""
        problems = [last_user_text(prompt) for prompt in prompts]
        return self.score_batch(problems, [assistant_text(completion) for completion in completions])

    def self_check(self) -> None:
        """
        Score a right and a corrupted solution.

        Raises:
            ValueError: the corrupted solution does not score lower.
        """
        good, bad = self.score(PROBLEM, ["\n\n".join(GOOD_STEPS), "\n\n".join(BAD_STEPS)])
        check_order(
            self,
            good=math.nan if good is None else good,
            bad=math.nan if bad is None else bad,
            shown=f"{good} and {bad}",
        )
