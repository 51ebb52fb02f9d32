"""
The task: `3+4-2=` is a problem, `3+4=7;7-2=5;#5` its worked solution.

A solution is text. A completion is what the policy generates: token ids, with the end-of-sequence token if it was
reached.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


NUM_OPERATIONS = 4
LARGEST_VALUE = 19
STEP_END = ";"
ANSWER = "#"
EOS = "<eos>"
# The longest worked solution has four steps of 9 tokens, such as `10+9=19;`, and `#19`
MAX_COMPLETION_LENGTH = 40


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def make_problem(rng: random.Random) -> str:
    """A running sum such as `3+4-2+5-1=`, whose value stays between 0 and 19."""
    value = rng.randint(1, 9)
    problem = str(value)
    for _ in range(NUM_OPERATIONS):
        term = rng.choice([t for t in range(-9, 10) if t != 0 and 0 <= value + t <= LARGEST_VALUE])
        value += term
        problem += f"{term:+d}"
    return problem + "="


def distinct_problems(seed: int) -> Iterator[str]:
    """Random problems, each of them once."""
    rng = random.Random(seed)
    seen = set()
    while True:
        problem = make_problem(rng)
        if problem not in seen:
            seen.add(problem)
            yield problem


class Problems(NamedTuple):
    """Problems for each purpose; no problem serves two purposes."""

    held_out: list[str]
    validation: list[str]
    warm_up: list[str]
    grpo: list[str]


def split_problems(seed: int, *, held_out: int, validation: int, warm_up: int, grpo: int) -> Problems:
    """Draw as many problems as each purpose needs."""
    source = distinct_problems(seed)
    sizes = (held_out, validation, warm_up, grpo)
    return Problems(*[list(islice(source, size)) for size in sizes])


# ---------------------------------------------------------------------------------------------------------------------
# Exact arithmetic


def terms_of(problem: str) -> list[str]:
    """`3+4-2=` -> `["3", "+4", "-2"]`."""
    return re.findall(r"[+-]?\d+", problem)


def exact_step(value: str, term: str) -> str:
    """`3`, `+4` -> `3+4=7;`."""
    return f"{value}{term}={int(value) + int(term)}{STEP_END}"


def stated_value(step: str) -> str | None:
    """`3+4=7;` -> `7`; `None` for a step that states no value."""
    stated = re.search(rf"=(-?\d+){STEP_END}$", step)
    return stated[1] if stated else None


def worked_solution(problem: str) -> str:
    """`3+4-2=` -> `3+4=7;7-2=5;#5`."""
    value, *terms = terms_of(problem)
    solution = ""
    for term in terms:
        step = exact_step(value, term)
        solution += step
        value = stated_value(step)
    return f"{solution}{ANSWER}{value}"


def solution_steps(solution: str) -> list[str]:
    """`3+4=7;7-2=5;#5` -> `["3+4=7;", "7-2=5;", "#5"]`."""
    return re.findall(rf"[^{STEP_END}]*{STEP_END}|[^{STEP_END}]+$", solution)


def exact_steps(problem: str, steps: list[str]) -> list[str]:
    """
    What each step of a solution should be, given the value that the step before it stated.

    The answer counts as the last step. Where no step can be right, after a step that states no value or after the
    answer, the exact step is empty.
    """
    value, *terms = terms_of(problem)
    exact = []
    for index, step in enumerate(steps):
        if value is None or index > len(terms):
            exact.append("")
        elif index == len(terms):
            exact.append(f"{ANSWER}{value}")
        else:
            exact.append(exact_step(value, terms[index]))
        value = stated_value(step)
    return exact


def right_steps(problem: str, steps: list[str]) -> list[bool]:
    """
    Whether each step takes the value that the step before it stated, applies the problem's next term, and adds up.

    A step after a wrong one can be right, so that one mistake costs one step.
    """
    return [step == exact for step, exact in zip(steps, exact_steps(problem, steps), strict=True)]


def right_answer(problem: str, text: str) -> bool:
    """Whether a completion's text ends with the right answer and the end of sequence."""
    value = sum(int(term) for term in terms_of(problem))
    return text.rpartition(STEP_END)[2] == f"{ANSWER}{value}{EOS}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that every step ends exactly at a token."""
    tokens = ["<pad>", "<bos>", EOS, *"0123456789+-=", ANSWER, STEP_END]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token=EOS, padding_side="left"
    )


TOKENIZER = build_tokenizer()


def text_of(completion: list[int]) -> str:
    """Text of a completion, its end-of-sequence token included."""
    return "".join(TOKENIZER.convert_ids_to_tokens(completion))


class Step(NamedTuple):
    """Text of a step of a completion, and the index of its last token."""

    text: str
    end: int


def split_steps(completion: list[int]) -> list[Step]:
    """
    Cut a completion after each `;`; the answer is not a step.

    Tokens after the last `;` are an unfinished step, unless they are the answer or the end of sequence. A completion
    without any step is one step, which is wrong: not judged at all, a completion that skips the working would do
    better than one with a mistake.
    """
    tokens = TOKENIZER.convert_ids_to_tokens(completion)
    steps = []
    start = 0
    for index, token in enumerate(tokens):
        if token == STEP_END:
            steps.append(Step("".join(tokens[start : index + 1]), index))
            start = index + 1
    rest = tokens[start:]
    unfinished = rest and rest[0] not in (ANSWER, EOS)
    if unfinished or not steps:
        steps.append(Step("".join(rest), len(tokens) - 1))
    return steps
