"""reasoning-gym tasks as GRPO data: rows of prompts, and a reward source that is the task's own scorer."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import Any

import reasoning_gym
from datasets import Dataset
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer


def task_rows(name: str, options: Mapping[str, Any]) -> Dataset:
    """
    Build a task's problems.

    Args:
        name (`str`):
            A reasoning-gym task, such as `"chain_sum"`.
        options (`Mapping[str, Any]`):
            Fields of the task's configuration: `size`, `seed` (0 unless given, so that all processes and all runs see
            the same problems) and the task's own, such as `min_terms`.

    Returns:
        `Dataset` with the columns `prompt` (one user message), `answer`, `task` and `entry`, the whole reasoning-gym
        entry as a JSON string, which [`task_score`] reads.

    Raises:
        ValueError: unknown task or option, a value that the task refuses, or a task whose entries JSON cannot hold.
    """
    task = create_task(name, {"seed": 0, **options})
    check_survives_json(name, task, task[0])
    entries = (task[index] for index in range(len(task)))
    return Dataset.from_list([as_row(name, entry) for entry in entries])


def as_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": entry["question"]}]
    return {"prompt": prompt, "answer": entry["answer"], "task": name, "entry": json.dumps(entry)}


def create_task(name: str, options: Mapping[str, Any]) -> reasoning_gym.dataset.ProceduralDataset:
    """`reasoning_gym.create_dataset` with errors that say what would have been right."""
    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name!r}; did you mean one of: {', '.join(close)}?")
    known = [field.name for field in fields(DATASETS[name][1])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"reasoning-gym task {name!r} has no {', '.join(unknown)}; it has: {', '.join(known)}.")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except AssertionError as error:
        raise ValueError(f"reasoning-gym task {name!r} refuses the options {dict(options)}: {error}") from error


def check_survives_json(name: str, task: reasoning_gym.dataset.ProceduralDataset, entry: dict[str, Any]) -> None:
    """A few tasks compare tuples, which JSON turns into lists: their right answers would be scored as wrong."""
    if task.score_answer(entry["answer"], json.loads(json.dumps(entry))) != task.score_answer(entry["answer"], entry):
        raise ValueError(f"reasoning-gym task {name!r} cannot be used: its entries change when stored as JSON.")


def task_score(completions: list[Any], task: list[str], entry: list[str], **kwargs: Any) -> list[float]:
    """Outcome reward source: the score, 0 to 1, that the row's task gives to the completion's final answer."""
    answers = [final_answer(completion) for completion in completions]
    return [scorer(name)(answer, json.loads(row)) for answer, name, row in zip(answers, task, entry, strict=True)]


@cache
def scorer(name: str) -> Callable[[str | None, dict[str, Any]], float]:
    return reasoning_gym.get_score_answer_fn(name)


def final_answer(completion: str | list[dict[str, str]]) -> str | None:
    """What stands in the last `<answer>` tags, or the last number if there are none; `None` without either."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    numbers = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)
    return extract_answer(text) or (numbers[-1] if numbers else None)
