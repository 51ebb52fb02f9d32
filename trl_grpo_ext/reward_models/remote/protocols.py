"""What reward servers are sent and how their answers are parsed: OpenRLHF's protocol and vLLM's, without HTTP."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...rewards.types import check_number


# The scores of one completion's steps, None for a step without one; None in place of the list where the server failed
StepScores = list[float | None] | None
# The score of one completion, None where there is none
Score = float | None

OPENRLHF_PATH = "/get_reward"
VLLM_STEPS_PATH = "/pooling"
VLLM_OUTCOMES_PATH = "/classify"

_SHOWN_CHARACTERS = 500


class RewardServerError(RuntimeError):
    """A reward server that could not be reached, refused, failed, was too slow or answered something else."""


class Request(NamedTuple):
    """
    A request for the scores of a few completions.

    Args:
        payload (`dict[str, Any]`):
            What is sent, as JSON.
        completions (`int`):
            Number of completions.
        parse (`Callable[[Any], list[Any]]`):
            Maps the answer's JSON to one score for each completion, or raises [`RewardServerError`].
    """

    payload: dict[str, Any]
    completions: int
    parse: Callable[[Any], list[Any]]


def shown(value: Any) -> str:
    """The beginning of a value as text, for errors."""
    return str(value)[:_SHOWN_CHARACTERS]


def counted(values: Any, count: int, what: str) -> list[Any]:
    """
    A list of the right length.

    Args:
        values (`Any`):
            A part of an answer.
        count (`int`):
            The number of entries that it must have.
        what (`str`):
            Names it in errors.

    Raises:
        RewardServerError: no list, or one of another length.
    """
    if not isinstance(values, list):
        raise RewardServerError(f"{what} is {shown(values)!r}, not a list.")
    if len(values) != count:
        raise RewardServerError(f"{what} has {len(values)} entries where {count} were asked for.")
    return values


def _entry(answer: Any, name: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise RewardServerError(f"the answer has no `{name}`: {shown(answer)}")
    return answer[name]


def _number(value: Any, what: str) -> float:
    try:
        if not isinstance(value, bool):
            return check_number(value, what)
    except (TypeError, ValueError):
        pass
    raise RewardServerError(f"{what} is {shown(value)!r}, which is not a finite number of float32.")


def _number_or_none(value: Any, what: str) -> float | None:
    return None if value is None else _number(value, what)


class Query(NamedTuple):
    """
    A completion as OpenRLHF's protocol sends it.

    Args:
        prompt (`str`):
            The problem, in the template of the reward model where one is known.
        query (`str`):
            The prompt followed by the completion.
        steps (`Sequence[str]`):
            The steps that the query holds.
    """

    prompt: str
    query: str
    steps: Sequence[str]


def plain_query(problem: str, steps: Sequence[str]) -> Query:
    """The query of a server that brings problem and steps into its model's form by itself."""
    return Query(problem, problem + "\n\n".join(steps), steps)


def openrlhf_steps(queries: Sequence[Query]) -> Request:
    """
    A request of OpenRLHF's protocol, extended by steps.

    Args:
        queries (`Sequence[Query]`):
            The completions.

    Returns:
        [`Request`]: the answer's `step_scores` must have one number or null for each step.
    """
    payload = {
        "query": [query.query for query in queries],
        "prompts": [query.prompt for query in queries],
        "labels": [None] * len(queries),
        "steps": [list(query.steps) for query in queries],
    }

    def parse(answer: Any) -> list[StepScores]:
        scores: list[StepScores] = []
        listed = counted(_entry(answer, "step_scores"), len(queries), "`step_scores`")
        for row, (values, query) in enumerate(zip(listed, queries, strict=True)):
            where = f"`step_scores[{row}]`"
            values = counted(values, len(query.steps), where)
            scores.append([_number_or_none(value, f"{where}[{step}]") for step, value in enumerate(values)])
        return scores

    return Request(payload, len(queries), parse)


def openrlhf_outcomes(queries: Sequence[Query], labels: Sequence[Any]) -> Request:
    """
    A request of OpenRLHF's protocol.

    Args:
        queries (`Sequence[Query]`):
            The completions.
        labels (`Sequence[Any]`):
            What the server may compare each completion with.

    Returns:
        [`Request`]: the answer's `rewards` must have one number or null for each completion.
    """
    payload = {
        "query": [query.query for query in queries],
        "prompts": [query.prompt for query in queries],
        "labels": list(labels),
    }

    def parse(answer: Any) -> list[Score]:
        values = counted(_entry(answer, "rewards"), len(queries), "`rewards`")
        return [_number_or_none(value, f"`rewards[{row}]`") for row, value in enumerate(values)]

    return Request(payload, len(queries), parse)


def _vllm_payload(model: str | None, **content: Any) -> dict[str, Any]:
    return content if model is None else {"model": model, **content}


def vllm_steps(
    model: str | None, ids: Sequence[int], score_positions: Sequence[int], labels: Sequence[int]
) -> Request:
    """
    A request of vLLM's token classification of one rendered completion.

    A server with a `step_tag_id` answers one row of probabilities per such id, also for one that the policy wrote; any
    other server one row per token. Only the rows of the score positions count.

    Args:
        model (`str` or `None`):
            Name of the served model.
        ids (`Sequence[int]`):
            The rendered completion.
        score_positions (`Sequence[int]`):
            Index into `ids` of each step's score.
        labels (`Sequence[int]`):
            The labels whose probabilities are added.

    Returns:
        [`Request`]
    """
    everywhere = list(range(len(ids)))
    # Where steps end in different ids the server cannot have a tag, and the rows must be those of all tokens
    tags = {ids[position] for position in score_positions}
    tagged = [position for position in everywhere if tags == {ids[position]}] or everywhere

    def parse_row(row: Any, where: str) -> float:
        if not isinstance(row, list) or not all(-len(row) <= label < len(row) for label in labels):
            raise RewardServerError(f"{where} is {shown(row)}, without the label(s) {list(labels)}.")
        return math.fsum(_number(row[label], where) for label in labels)

    def parse(answer: Any) -> list[StepScores]:
        rows = _entry(counted(_entry(answer, "data"), 1, "`data`")[0], "data")
        positions = everywhere if isinstance(rows, list) and len(rows) == len(ids) else tagged
        row_at = dict(zip(positions, counted(rows, len(positions), "`data[0].data`"), strict=True))
        scored: StepScores = [
            parse_row(row_at[position], f"the row of step {k}") for k, position in enumerate(score_positions)
        ]
        return [scored]

    return Request(_vllm_payload(model, input=list(ids), task="token_classify"), 1, parse)


def vllm_outcome(model: str | None, **content: Any) -> Request:
    """
    A request of vLLM's classification of one completion.

    Args:
        model (`str` or `None`):
            Name of the served model.
        **content:
            The completion: `input`, its ids, or `messages`, a conversation.

    Returns:
        [`Request`]: the score is the last of the answer's `probs`, a logit.
    """

    def parse(answer: Any) -> list[Score]:
        probs = _entry(counted(_entry(answer, "data"), 1, "`data`")[0], "probs")
        if not isinstance(probs, list) or not probs:
            raise RewardServerError(f"`data[0].probs` is {shown(probs)!r}, not a list of numbers.")
        return [_number(probs[-1], "`data[0].probs[-1]`")]

    return Request(_vllm_payload(model, **content, use_activation=False), 1, parse)
