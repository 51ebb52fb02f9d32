"""What the policy was asked and what it wrote, as reward models take them, and their scores on its tokens."""

from collections.abc import Sequence
from typing import Any

from ..rewards.types import StepRewards
from .alignment import align_tokens, strip_special
from .segmentation import Segmentation, Step, segment


def last_user_text(prompt: Any) -> str:
    """The problem that a prompt poses: a plain prompt as it is, or what the user said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    if not said or not isinstance(said[-1], str):
        raise ValueError(f"a reward model needs a prompt whose last user message is text, got {prompt!r}.")
    return said[-1]


def assistant_text(completion: Any) -> str:
    """What the policy wrote: a plain completion as it is, or its messages joined by blank lines."""
    if isinstance(completion, str):
        return completion
    return "\n\n".join(
        message["content"] for message in completion if message["role"] == "assistant" and message.get("content")
    )


def policy_steps(
    policy_tokenizer: Any, completion_ids: Sequence[int], segmentation: Segmentation, source: str
) -> list[Step]:
    """
    Steps of a completion, each with the index of its last token.

    Raises:
        ValueError: `policy_tokenizer` is `None`; the message names `source`.
    """
    if policy_tokenizer is None:
        raise ValueError(
            f"{source} has no `policy_tokenizer` to read completion_ids with: GRPOExtTrainer sets it; elsewhere set "
            "the policy's own."
        )
    return segment(align_tokens(policy_tokenizer, strip_special(policy_tokenizer, completion_ids)), segmentation)


def place_on_tokens(steps: Sequence[Step], scores: Sequence[float | None] | None) -> StepRewards | None:
    """Scores on the last tokens of their steps; `None` where the completion was not judged."""
    return None if scores is None else StepRewards([step.end for step in steps], list(scores))
