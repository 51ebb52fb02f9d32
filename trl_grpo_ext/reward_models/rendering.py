"""
Problem and steps to a reward model's ids, piece by piece, with the positions where its scores are.

The score positions are noted while the ids are put together, so that a text that looks like a tag adds none. The
renderings of the known models are in [`~trl_grpo_ext.reward_models.renderings`].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .plain_data import CheckedFields


# A problem: a text, or a conversation, whose messages have texts
Problem = str | Sequence[Mapping[str, Any]]


class Rendered(NamedTuple):
    """
    One solution as a reward model's input.

    Args:
        ids (`list[int]`):
            The ids; none where a chat template leaves a step out, or rewrites it so that it is not found.
        prompt_length (`int`):
            Number of ids before the first step.
        score_positions (`list[int]`):
            Index into `ids` of each step's score, increasing. The steps that did not fit are the last ones, and have
            none.
    """

    ids: list[int]
    prompt_length: int
    score_positions: list[int]


class RenderedBatch(NamedTuple):
    """
    Rendered solutions, padded on the right.

    Args:
        input_ids_BL (`torch.Tensor` of shape `(B, L)`):
            Ids.
        attention_mask_BL (`torch.Tensor` of shape `(B, L)`):
            1 where attention may look.
        rows_R (`torch.Tensor` of shape `(R,)`):
            Row of each score position.
        columns_R (`torch.Tensor` of shape `(R,)`):
            Column of each score position.
        prompt_lengths_B (`torch.Tensor` of shape `(B,)`):
            Number of ids before the first step.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    rows_R: torch.Tensor
    columns_R: torch.Tensor
    prompt_lengths_B: torch.Tensor

    def at_score_positions(self, values_BL: torch.Tensor) -> torch.Tensor:
        """Values of shape `(B, L, ...)` at the score positions, of shape `(R, ...)`, in float32."""
        return values_BL[self.rows_R, self.columns_R].float()


def check_shape(values: torch.Tensor, expected: tuple[int, ...], what: str) -> None:
    """
    Raise `ValueError` if what a class of the user computes at the score positions has another shape than expected.

    Args:
        values (`torch.Tensor`):
            What was computed.
        expected (`tuple[int, ...]`):
            The shape, whose first axis is that of the score positions.
        what (`str`):
            Names the class in the error.
    """
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{what} returned a tensor of shape {tuple(values.shape)}; expected {expected}, with a row for each of "
            f"the {expected[0]} score positions."
        )


class RenderedStep(NamedTuple):
    """
    One step as a part of the input.

    Args:
        ids (`list[int]`):
            The step's ids, with its tag or its answer.
        score_offset (`int`):
            Index into `ids` of its score.
    """

    ids: list[int]
    score_offset: int


class Rendering(CheckedFields, ABC):
    """
    How a problem and the steps of a solution become a reward model's input.

    A preset in YAML names a rendering of your own by its import path.
    """

    @property
    def takes_conversations(self) -> bool:
        """Whether a problem may be a conversation, beside a text."""
        return False

    def check(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the tokenizer does not suit, such as a tag that is not exactly one id."""

    @abstractmethod
    def prompt_ids(self, tokenizer: Any, problem: str) -> list[int]:
        """Ids before the first step."""

    @abstractmethod
    def step_ids(self, tokenizer: Any, steps: Sequence[str]) -> Iterator[RenderedStep]:
        """Ids of each step in turn."""

    def inputs(self, steps: Sequence[str]) -> list[Sequence[str]]:
        """The steps of each input that a solution becomes: all in one input, or an input for each step."""
        return [steps]

    def render(
        self, tokenizer: Any, problem: Problem, steps: Sequence[str], max_length: int | None = None
    ) -> Rendered:
        """
        Put the input together from whole steps.

        Args:
            tokenizer (`PreTrainedTokenizerBase`):
                The reward model's own.
            problem (`str`, or `Sequence[Mapping[str, Any]]` where the rendering takes conversations):
                The problem.
            steps (`Sequence[str]`):
                The steps of one solution.
            max_length (`int`, *optional*):
                Largest number of ids; the first step that would pass it and all after it are left out.

        Returns:
            [`Rendered`]

        Raises:
            TypeError: a conversation where a text belongs.
        """
        if not isinstance(problem, str):
            raise TypeError(f"this rendering writes a problem that is a text; it is {problem!r}.")
        ids = list(self.prompt_ids(tokenizer, problem))
        prompt_length = len(ids)
        score_positions = []
        for step in self.step_ids(tokenizer, steps):
            if max_length is not None and len(ids) + len(step.ids) > max_length:
                break
            score_positions.append(len(ids) + step.score_offset)
            ids += step.ids
        return Rendered(ids, prompt_length, score_positions)
