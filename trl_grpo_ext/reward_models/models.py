"""Process and outcome reward models: usable by themselves and as reward functions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ..rewards.types import StepRewards
from ..steps.alignment import align_tokens
from ..steps.policy_text import assistant_text, place_on_tokens, policy_steps, warn_of_thinking
from ..steps.segmentation import Segmentation, segment, split_text
from .base import RewardModel
from .encoding import encode_text
from .rendering import Problem
from .self_check import BAD_STEPS, CORRUPTED, GOOD_STEPS, PROBLEM, check_order
from .texts import check_texts


class ProcessRewardModel(RewardModel):
    """
    A process reward model: one score for each step of a solution.

    It can be used by itself, and as a reward function of [`GRPOExtTrainer`]. There each score is placed on the last
    token of its step.

    Args:
        scorer, tokenizer, preset, name, max_length, segmentation, policy_tokenizer:
            As in [`RewardModel`]; [`~RewardModel.from_pretrained`] loads them.

    Example:

    ```python
    >>> prm = ProcessRewardModel.from_pretrained("Qwen/Qwen2.5-Math-PRM-7B", dtype="bfloat16")
    >>> # One list for each solution, one score in [0, 1] for each of its steps
    >>> prm.score("What is 2 + 3 * 4?", ["3 * 4 = 12\n\n2 + 12 = 14", "2 + 3 = 5\n\n5 * 4 = 20"])
    ```
    """

    kind = "process"

    def score_steps(self, problems: Sequence[Problem], steps: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """
        Scores of steps that are already split.

        Args:
            problems (`Sequence[str | list[dict]]`):
                The problem of each solution: a text, or a conversation where a chat template writes it.
            steps (`Sequence[Sequence[str]]`):
                The steps of each solution.

        Returns:
            `list[list[float | None]]`: as many as there are steps; `None` for those that did not fit into
            `max_length`, which are the last ones.

        Raises:
            TypeError: a text where a list of steps or of problems belongs.
            ValueError: an empty step, or another number of problems than of solutions.
        """
        problems = self._problem.check(problems)
        if len(problems) != len(steps):
            raise ValueError(f"{len(problems)} problems for {len(steps)} solutions.")
        for index, own in enumerate(steps):
            if isinstance(own, str):
                raise TypeError(f"solution {index} is a text, {own!r}; give its steps as a list, or use `score`.")
            for number, step in enumerate(own):
                if not step.strip():
                    raise ValueError(f"solution {index}: step {number} is empty.")
        inputs = [self.preset.rendering.inputs(own) for own in steps]
        rendered = []
        for problem, own in zip(problems, inputs, strict=True):
            rendered += [self._render(problem, part) for part in own]
        found = iter(self._score(rendered))
        scores = []
        for own, parts in zip(steps, inputs, strict=True):
            values: list[float | None] = []
            for _ in parts:
                scored = next(found)
                # What did not fit is the end of this input
                values += [*scored, *[None] * (len(own) // len(parts) - len(scored))]
            scores.append(values)
        return scores

    def split(self, solution: str) -> list[str]:
        """Steps of a solution that is text, by `segmentation` and in its scope; tokens are the reward model's."""
        own = self.segmentation
        if own.by != "tokens" and own.min_step_tokens == 1 and own.max_steps is None:
            parts = [solution[start:end] for start, end in own.in_scope(solution)]
            return [own.text_of(part[start:end]) for part in parts for start, end in split_text(part, own)]
        aligned = align_tokens(self.tokenizer, encode_text(self.tokenizer, solution))
        return [step.text for step in segment(aligned, own)]

    def score(self, problem: Problem, solutions: Sequence[str]) -> list[list[float | None]]:
        """
        Scores of the steps of solutions to one problem.

        Args:
            problem (`str` or `list[dict]`):
                The problem, see [`~ProcessRewardModel.score_steps`].
            solutions (`Sequence[str]`):
                The solutions, which [`~ProcessRewardModel.split`] cuts into steps.

        Returns:
            `list[list[float | None]]`: as [`~ProcessRewardModel.score_steps`].
        """
        check_texts(solutions, "solutions")
        if self.segmentation.scope is None and any(map(self.segmentation.find_thinking, solutions)):
            warn_of_thinking(self._source)
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
        steps = policy_steps(
            self.policy_tokenizer, completion_ids, tool_mask, self.segmentation, self._source, prompts, prompt_ids
        )
        problems = self._problems(prompts, columns)
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


def _in_scope(solution: str, segmentation: Segmentation) -> str | None:
    """What a solution says in scope, `None` for nothing."""
    parts = [solution[start:end].strip() for start, end in segmentation.in_scope(solution)]
    return "\n\n".join(part for part in parts if part) or None


class OutcomeRewardModel(RewardModel):
    """
    An outcome reward model: one number for each solution.

    It can be used by itself, and as a reward function of [`GRPOExtTrainer`].

    Where the segmentation has the scope `"answer"` or `"thinking"`, that part of each turn is the solution. It is read
    from the policy's tokens, because TRL leaves tags that are special tokens out of its texts. A completion without
    such a part is not judged.

    Example:

    ```python
    >>> orm = OutcomeRewardModel.from_pretrained("nvidia/AceMath-7B-RM", dtype="bfloat16")
    >>> # One number for each solution
    >>> orm.score("What is 2 + 3 * 4?", ["2 + 12 = 14", "5 * 4 = 20"])
    ```
    """

    kind = "outcome"

    def score_batch(self, problems: Sequence[Problem], solutions: Sequence[str]) -> list[float | None]:
        """
        Scores of solutions to several problems.

        Args:
            problems (`Sequence[str | list[dict]]`):
                The problem of each solution: a text, or a conversation where a chat template writes it.
            solutions (`Sequence[str]`):
                The solutions.

        Returns:
            `list[float | None]`: one number for each solution; `None` for one that does not fit into `max_length`.
        """
        problems = self._problem.check(problems)
        check_texts(solutions, "solutions")
        if self._takes_all:
            return self._score_texts(problems, solutions)
        return self._score_texts(problems, [_in_scope(solution, self.segmentation) for solution in solutions])

    @property
    def _takes_all(self) -> bool:
        return self.segmentation.scope in (None, "all")

    def _score_texts(self, problems: Sequence[Problem], texts: Sequence[str | None]) -> list[float | None]:
        pairs = zip(problems, texts, strict=True)
        # Also those that are not judged, for which the model's forward is waited for by other processes
        scores = self._score([self._render(problem, [] if text is None else [text]) for problem, text in pairs])
        return [values[0] if values else None for values in scores]

    def score(self, problem: Problem, solutions: Sequence[str]) -> list[float | None]:
        """One number for each solution to one problem."""
        check_texts(solutions, "solutions")
        return self.score_batch([problem] * len(solutions), solutions)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] = (),
        tool_mask: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """TRL's call of a reward function. `completion_ids` are read if the segmentation has a scope."""
        problems = self._problems(prompts, columns)
        if self._takes_all:
            texts = [assistant_text(completion) for completion in completions]
            if self.segmentation.scope is None and any(map(self.segmentation.find_thinking, texts)):
                warn_of_thinking(self._source)
            return self._score_texts(problems, texts)
        turns = replace(self.segmentation, by="turn", min_step_tokens=1, max_steps=None)
        steps = policy_steps(
            self.policy_tokenizer, completion_ids, tool_mask, turns, self._source, prompts, prompt_ids
        )
        joined = ["\n\n".join(step.text for step in own) for own in steps]
        return self._score_texts(problems, [text or None for text in joined])

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
