"""What the policy was asked and what it wrote, and the placing of step rewards on its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..distributed import warn_once
from ..rewards.turns import Turn, find_turns
from ..rewards.types import StepRewards, plain
from .alignment import align_tokens, strip_special
from .segmentation import Segmentation, Step, join_turns, segment
from .thinking import is_unclosed, opens_thinking


logger = logging.get_logger(__name__)

# The type of a part of a message that is text, and the key under which the text is
_TEXT = "text"

# The problem by default, in errors
_LAST_USER = "the problem, which is the prompt's last user message,"

# Tokens before a turn of which the last ones may be an opening tag of thinking and white space
_TAG_TOKENS = 32


def last_user_text(prompt: Any) -> str:
    """
    The problem that a prompt poses: a plain prompt as it is, or what the user said last in a conversation.

    Args:
        prompt (`str` or `list[dict]`):
            A prompt as TRL gives it to reward functions.

    Raises:
        TypeError: the last user message has a content that is none.
        ValueError: a conversation without a user message, or whose last one has no text or has parts beside it.
    """
    if isinstance(prompt, str):
        return prompt
    said = [message.get("content") for message in prompt if message["role"] == "user"][-1:]
    for content in said:
        check_text_only(content, _LAST_USER)
    if not any(kinds_of_parts(content) for content in said):
        raise ValueError(
            "the problem is the text of the prompt's last user message, and there is none in the prompt "
            f"{prompt!r}; use reward functions that do not need it."
        )
    return message_text(said[0])


def check_text_only(content: Any, what: str) -> None:
    """
    Check that a message's content is text.

    Args:
        content (`Any`):
            The content; `None` for a message that has none, as one with calls of tools alone.
        what (`str`):
            Names it in the errors.

    Raises:
        TypeError: no content at all.
        ValueError: parts that are no text.
    """
    if not _is_content(content):
        raise TypeError(
            f"{what} has the content {content!r}. A message's content is a text, None, or a list of parts such as "
            "{'type': 'text', 'text': 'What is 2 + 3?'}."
        )
    beside = [kind for kind in kinds_of_parts(content) if kind != _TEXT]
    if beside:
        raise ValueError(
            f"{what} also has parts of type {', '.join(dict.fromkeys(beside))}. Reward models that this package loads "
            "or serves read text alone, since no preset has a model for images. JudgeSteps and JudgeOutcome give the "
            "judge a prompt's images, and reward functions of your own get the whole prompt."
        )


def _is_content(content: Any) -> bool:
    if not isinstance(content, list):
        return content is None or isinstance(content, str)
    parts = [part for part in content if isinstance(part, Mapping) and isinstance(part.get("type"), str)]
    texts = [part.get(_TEXT) for part in parts if part["type"] == _TEXT]
    return len(parts) == len(content) and all(isinstance(text, str) for text in texts)


def kinds_of_parts(content: Any) -> list[str]:
    """The type of each part of a message's content: a text, a list of `{"type": ..., ...}`, or `None`."""
    if isinstance(content, list):
        return [part["type"] for part in content]
    return [] if content is None else [_TEXT]


def message_text(content: Any) -> str:
    """The text of a message: its content, or the text parts of it one after the other, as in chat templates."""
    if isinstance(content, list):
        return "".join(part[_TEXT] for part in content if part["type"] == _TEXT)
    return content or ""


def assistant_text(completion: Any) -> str:
    """
    What the policy wrote: a plain completion as it is, or the texts of its messages joined by blank lines.

    Parts of a message that are no text are left out.

    Args:
        completion (`str` or `list[dict]`):
            A completion as TRL gives it to reward functions.
    """
    if isinstance(completion, str):
        return completion
    texts = [message_text(message.get("content")) for message in completion if message["role"] == "assistant"]
    return "\n\n".join(text for text in texts if text)


def policy_steps(
    policy_tokenizer: Any,
    completion_ids: Sequence[Sequence[int]],
    tool_mask: Sequence[Sequence[int]] | None,
    segmentation: Segmentation,
    source: str,
    prompts: Sequence[Any] | None = None,
    prompt_ids: Sequence[Sequence[int]] | None = None,
) -> list[list[Step]]:
    """
    Steps of completions, each with the index of its last token.

    Special tokens are decoded too, so that tags of thinking are seen where they are special tokens.

    Args:
        policy_tokenizer (`PreTrainedTokenizerBase` or `None`):
            The tokenizer that the completion was generated with.
        completion_ids (`Sequence[Sequence[int]]`):
            Token ids of each completion. Special tokens at the end of a turn belong to no step.
        tool_mask (`Sequence[Sequence[int]]` or `None`):
            For each of them 1 if the policy wrote it, 0 if it is a tool's output, which is not read. `None` if the
            policy wrote all of them.
        segmentation ([`Segmentation`]):
            How a completion is cut, and which part of it has steps.
        source (`str`):
            Names the reward source in the error and the warning.
        prompts (`Sequence[str | list[dict]]`, *optional*):
            The prompts as TRL gives them to reward functions. Without `prompt_ids`, the end of a prompt that is text
            says whether the prompt has opened thinking.
        prompt_ids (`Sequence[Sequence[int]]`, *optional*):
            Token ids of each prompt, whose end says whether the chat template has opened thinking.

    Returns:
        `list[list[Step]]`: `last_token` of each is an index into the completion's ids.

    Raises:
        ValueError: `policy_tokenizer` is `None`; the message names `source`.
    """
    if policy_tokenizer is None:
        raise ValueError(
            f"{source} has no `policy_tokenizer` to decode completion_ids with. GRPOExtTrainer sets it for sources "
            "in `reward_funcs`; elsewhere set it to the policy's own."
        )
    # A rollout function may return tensors
    completion_ids = plain(completion_ids)
    steps_of_rows = []
    for row, ids in enumerate(completion_ids):
        turns = [Turn(0, len(ids))] if tool_mask is None else find_turns(plain(tool_mask[row]))
        if prompt_ids is not None:
            before = policy_tokenizer.decode(plain(prompt_ids[row])[-_TAG_TOKENS:])
        else:
            before = prompts[row] if prompts is not None and isinstance(prompts[row], str) else ""
        steps_of_rows.append(_steps_of_turns(policy_tokenizer, ids, turns, segmentation, before, source))
    return steps_of_rows


def _steps_of_turns(
    policy_tokenizer: Any,
    ids: Sequence[int],
    turns: Sequence[Turn],
    segmentation: Segmentation,
    before: str,
    source: str,
) -> list[Step]:
    """The steps of a completion, whose first turn follows the text `before`."""
    tags = segmentation.tags
    steps = []
    # Thinking that goes on behind a tool's output
    unclosed = False
    for start, end in turns:
        aligned = align_tokens(policy_tokenizer, strip_special(policy_tokenizer, ids[start:end], keep=tags))
        # Before a later turn stands a tool's output, and what the chat template writes after it
        text_before = policy_tokenizer.decode(ids[max(start - _TAG_TOKENS, 0) : start]) if start else before
        is_open = unclosed or opens_thinking(text_before, tags)
        # Everything is judged, wherever the thinking ends
        thinking = [] if segmentation.scope == "all" else segmentation.find_thinking(aligned.text, is_open)
        unclosed = is_unclosed(thinking, aligned.text)
        if segmentation.scope is None and thinking:
            warn_of_thinking(source)
        for text, last_token in segment(aligned, segmentation, thinking):
            steps.append(Step(text, start + last_token))
    return join_turns(steps, segmentation)


def warn_of_thinking(source: str) -> None:
    """Say once that a source judges thinking, where its segmentation does not say that it should."""
    warn_once(
        logger,
        f"{source}: a completion holds thinking, which is judged with the answer. Say what is to be judged by the "
        "scope of the segmentation: Segmentation(scope='answer') leaves thinking out, 'thinking' leaves the "
        "answer out, and 'all' judges both without this warning. This is said once.",
    )


def warn_of_template(source: str) -> None:
    """Say once that solutions stay unjudged because of what the reward model's chat template does with them."""
    warn_once(
        logger,
        f"{source}: the chat template leaves out or rewrites a step of a solution, as some templates do with "
        "thinking, so that it is not found in what the model would read. Such solutions stay unjudged. With "
        "Segmentation(scope='answer') the template is given no thinking. This is said once.",
    )


def place_on_tokens(steps: Sequence[Step], scores: Sequence[float | None] | None) -> StepRewards | None:
    """
    Put the score of each step on the step's last token.

        StepRewards(ends[k] = steps[k].last_token, values[k] = scores[k])

    Args:
        steps (`Sequence[Step]`):
            Steps of one completion.
        scores (`Sequence[float | None]` or `None`):
            As many as there are steps; `None` for a step that was not scored, and instead of the list for a completion
            that was not judged.

    Returns:
        [`StepRewards`], or `None` for a completion that was not judged.
    """
    return None if scores is None else StepRewards([step.last_token for step in steps], list(scores))
