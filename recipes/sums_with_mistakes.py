"""Worked solutions of the quickstart's sums with mistakes that policies make, and exact judgement of every step."""

import random
import re

from quickstart import EOS, LARGEST_VALUE, STEP_END, TOKENIZER, judge_answer, terms_of


EQUATION = re.compile(rf"(-?\d+)([+-]\d+)=(-?\d+){STEP_END}")


def exact_step(value: str, term: str) -> str:
    return f"{value}{term}={int(value) + int(term)}{STEP_END}"


def stated_value(step: str) -> str | None:
    stated = re.search(rf"=(-?\d+){STEP_END}$", step)
    return stated[1] if stated else None


def exact_steps(problem: str, steps: list[str]) -> list[str]:
    """
    What each step should be, given the value that the step before it stated; empty where nothing can be right.

    The last one is the answer. A step after a wrong one can be right: a mistake is charged once, where it was made.
    """
    value, *terms = terms_of(problem)
    exact = []
    for index, step in enumerate(steps):
        if value is None or index > len(terms):
            exact.append("")
        else:
            exact.append(exact_step(value, terms[index]) if index < len(terms) else f"#{value}")
        value = stated_value(step)
    return exact


def another_value(value: int, rng: random.Random) -> int:
    """A wrong value, as often as not near the right one."""
    near = range(max(value - 3, 0), value + 4)
    return rng.choice([number for number in (*near, *near, *range(LARGEST_VALUE + 1)) if number != value])


def wrong_result(value: str, term: str, rng: random.Random) -> str:
    return f"{value}{term}={another_value(int(value) + int(term), rng)}{STEP_END}"


def wrong_term(value: str, term: str, rng: random.Random) -> str:
    others = [number for number in range(-9, 10) if number not in (0, int(term))]
    return exact_step(value, f"{rng.choice([*others, -int(term)]):+d}")


def wrong_start(value: str, term: str, rng: random.Random) -> str:
    return exact_step(str(another_value(int(value), rng)), term)


def slip(value: str, term: str, rng: random.Random) -> str:
    """A token left out, put in, or replaced by another."""
    step = exact_step(value, term)
    position = rng.randrange(len(step))
    token = rng.choice([token for token in TOKENIZER.get_vocab() if token not in (EOS, step[position])])
    return step[:position] + rng.choice(["", token, token + step[position]]) + step[position + 1 :]


# With how often each is made: about as often as by the policy, which adds up wrongly far more than anything else
MISTAKES = {wrong_result: 12, wrong_term: 1, wrong_start: 1, slip: 1}


def solution_with_mistakes(problem: str, rng: random.Random, rate: float) -> str:
    """A worked solution in which each step is wrong with probability `rate`; the next one carries on from it."""
    value, *terms = terms_of(problem)
    solution = ""
    for term in terms:
        mistake = rng.choices(list(MISTAKES), list(MISTAKES.values()))[0] if rng.random() < rate else None
        step = mistake(value, term, rng) if mistake else exact_step(value, term)
        solution += step
        value = stated_value(step) or value
    ending = rng.random()
    if ending < 0.05:
        return solution[: rng.randrange(len(solution)) + 1]
    if ending < 0.1:
        solution += exact_step(value, rng.choice(terms))
    return f"{solution}#{another_value(int(value), rng) if rng.random() < rate else value}"


def is_right(problem: str, solution: str) -> bool:
    return judge_answer([problem], [TOKENIZER(solution + EOS).input_ids]) == [1.0]
