"""What reward servers are sent and how their answers are read: OpenRLHF's protocol and vLLM's, without HTTP."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple


# One completion's steps, None where unscored; or one number; None for the whole where the server failed
StepScores = list[float | None] | None
Score = float | None

OPENRLHF_PATH = "/get_reward"
VLLM_STEPS_PATH = "/pooling"
VLLM_OUTCOMES_PATH = "/classify"

_SHOWN_CHARACTERS = 500


class RewardServerError(RuntimeError):
    """A reward server that could not be reached, refused, failed, was too slow or answered something else."""


class Request(NamedTuple):
    """What is sent for neighbouring completions, how many they are, and how the answer becomes a score for each."""

    payload: dict[str, Any]
    completions: int
    read: Callable[[Any], list[Any]]


def shown(value: Any) -> str:
    """`value` as errors show it."""
    return str(value)[:_SHOWN_CHARACTERS]


def counted(values: Any, count: int, what: str) -> list[Any]:
    """`values` if they are a list of `count`, else [`RewardServerError`]."""
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
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise RewardServerError(f"{what} is {shown(value)!r}, which is not a finite number.")
    return float(value)


def _number_or_none(value: Any, what: str) -> float | None:
    return None if value is None else _number(value, what)


def openrlhf_steps(problems: Sequence[str], steps: Sequence[Sequence[str]]) -> Request:
    """OpenRLHF's protocol with `steps`; the answer's `step_scores` has one number or null for each."""
    payload = {
        "query": [problem + "\n\n".join(own) for problem, own in zip(problems, steps, strict=True)],
        "prompts": list(problems),
        "labels": [None] * len(problems),
        "steps": [list(own) for own in steps],
    }

    def read(answer: Any) -> list[StepScores]:
        scores: list[StepScores] = []
        listed = counted(_entry(answer, "step_scores"), len(problems), "`step_scores`")
        for row, (values, own) in enumerate(zip(listed, steps, strict=True)):
            where = f"`step_scores[{row}]`"
            values = counted(values, len(own), where)
            scores.append([_number_or_none(value, f"{where}[{step}]") for step, value in enumerate(values)])
        return scores

    return Request(payload, len(problems), read)


def openrlhf_outcomes(problems: Sequence[str], solutions: Sequence[str], labels: Sequence[Any]) -> Request:
    """OpenRLHF's protocol; the answer's `rewards` has one number or null for each completion."""
    payload = {
        "query": [problem + solution for problem, solution in zip(problems, solutions, strict=True)],
        "prompts": list(problems),
        "labels": list(labels),
    }

    def read(answer: Any) -> list[Score]:
        values = counted(_entry(answer, "rewards"), len(problems), "`rewards`")
        return [_number_or_none(value, f"`rewards[{row}]`") for row, value in enumerate(values)]

    return Request(payload, len(problems), read)


def _vllm_payload(model: str | None, **content: Any) -> dict[str, Any]:
    return content if model is None else {"model": model, **content}


def vllm_steps(
    model: str | None, ids: Sequence[int], read_positions: Sequence[int], steps: int, labels: Sequence[int]
) -> Request:
    """
    vLLM's token classification of one rendered completion.

    A server with a `step_tag_id` answers one row of probabilities per such id, also for one that the policy wrote; any
    other server one row per token. Only the rows of the read positions count. Steps at the end that truncation left
    without a read position get `None`.
    """
    everywhere = list(range(len(ids)))
    # Where steps end in different ids the server cannot have a tag, and the rows must be those of all tokens
    tags = {ids[position] for position in read_positions}
    tagged = [position for position in everywhere if tags == {ids[position]}] or everywhere

    def read_row(row: Any, where: str) -> float:
        if not isinstance(row, list) or not all(-len(row) <= label < len(row) for label in labels):
            raise RewardServerError(f"{where} is {shown(row)}, without the label(s) {list(labels)}.")
        return math.fsum(_number(row[label], where) for label in labels)

    def read(answer: Any) -> list[StepScores]:
        rows = _entry(counted(_entry(answer, "data"), 1, "`data`")[0], "data")
        positions = everywhere if isinstance(rows, list) and len(rows) == len(ids) else tagged
        row_at = dict(zip(positions, counted(rows, len(positions), "`data[0].data`"), strict=True))
        scored = [read_row(row_at[position], f"the row of step {k}") for k, position in enumerate(read_positions)]
        return [[*scored, *[None] * (steps - len(scored))]]

    return Request(_vllm_payload(model, input=list(ids), task="token_classify"), 1, read)


def vllm_outcome(model: str | None, **content: Any) -> Request:
    """vLLM's classification of one completion, `input` ids or `messages`; the logit is the last of `probs`."""

    def read(answer: Any) -> list[Score]:
        probs = _entry(counted(_entry(answer, "data"), 1, "`data`")[0], "probs")
        if not isinstance(probs, list) or not probs:
            raise RewardServerError(f"`data[0].probs` is {shown(probs)!r}, not a list of numbers.")
        return [_number(probs[-1], "`data[0].probs[-1]`")]

    return Request(_vllm_payload(model, **content, use_activation=False), 1, read)
