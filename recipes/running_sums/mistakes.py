"""Solutions with the mistakes that policies make, to train reward models on."""

import random
import re

from running_sums.task import ANSWER, EOS, LARGEST_VALUE, STEP_END, TOKENIZER, exact_step, stated_value, terms_of


# The value that a step starts from, its term, and the value that it states
EQUATION = re.compile(rf"(-?\d+)([+-]\d+)=(-?\d+){STEP_END}")


def another_value(value: int, rng: random.Random) -> int:
    """A wrong value, as often as not near the right one."""
    near = range(max(value - 3, 0), value + 4)
    return rng.choice([number for number in (*near, *near, *range(LARGEST_VALUE + 1)) if number != value])


def wrong_result(value: str, term: str, rng: random.Random) -> str:
    """A step that does not add up."""
    return f"{value}{term}={another_value(int(value) + int(term), rng)}{STEP_END}"


def wrong_term(value: str, term: str, rng: random.Random) -> str:
    """A step that adds up, with another term than the problem's."""
    others = [number for number in range(-9, 10) if number not in (0, int(term))]
    return exact_step(value, f"{rng.choice([*others, -int(term)]):+d}")


def wrong_start(value: str, term: str, rng: random.Random) -> str:
    """A step that adds up, from another value than the one stated before."""
    return exact_step(str(another_value(int(value), rng)), term)


def slip(value: str, term: str, rng: random.Random) -> str:
    """A step with one token left out, put in, or replaced by another."""
    step = exact_step(value, term)
    position = rng.randrange(len(step))
    token = rng.choice([token for token in TOKENIZER.get_vocab() if token not in (EOS, step[position])])
    return step[:position] + rng.choice(["", token, token + step[position]]) + step[position + 1 :]


# How often each mistake is made, in about the proportions of the policy, which mostly adds up wrongly
MISTAKES = {wrong_result: 12, wrong_term: 1, wrong_start: 1, slip: 1}


def solution_with_mistakes(problem: str, rng: random.Random, rate: float) -> str:
    """
    A solution in which each step, and the answer, is wrong with probability `rate`.

    The step after a mistake starts from the value that the mistake states. One solution in twenty stops early, and one
    in twenty has a step too many.
    """
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
    answer = another_value(int(value), rng) if rng.random() < rate else value
    return f"{solution}{ANSWER}{answer}"
