"""Problems and solutions with the shapes of real step-by-step files, made here from a seed."""

import functools
import random
from typing import NamedTuple


class Solution(NamedTuple):
    problem: str
    steps: list[str]


NAMES = ["Janet", "Sue", "Tom", "Weng", "Ahmed", "Zoë"]
THINGS = ["eggs", "pink flamingos", "slices of pizza", "marbles", "cafés", "litres of milk"]


def _gsm8k(draw: random.Random) -> Solution:
    """Single lines with calculator notes, and the answer after `####`."""
    name = draw.choice(NAMES)
    things = draw.choice(THINGS)
    price = draw.randint(2, 19)
    problem = f"{name} sells {things} for ${price} each, {draw.randint(3, 60)} a day. How much is that in a week?"
    steps = []
    total = draw.randint(2, 90)
    for _ in range(draw.randint(1, 7)):
        more = draw.randint(2, 12)
        steps.append(f"{name} has {total}*{more}=<<{total}*{more}={total * more}>>{total * more} {things}.")
        total *= more
    return Solution(problem, [*steps, f"#### {total}"])


def _prmbench(draw: random.Random) -> Solution:
    """Numbered steps with maths, as PRM800K and PRMBench have them."""
    a = draw.randint(2, 40)
    b = draw.randint(2, 9)
    problem = f"Find all real $x$ with \\(x^{b} - {a}x = 0\\), and give $\\frac{{1}}{{{a}}}$ of their sum!"
    wordings = [
        "Factor out $x$: \\[x(x^{{{p}}} - {a}) = 0.\\]",
        "So $x = 0$ or $x^{{{p}}} = {a}$; (the second has $\\left\\lfloor{p}/2\\right\\rfloor$ roots).",
        "$$x = \\sqrt[{p}]{{{a}}} \\approx {v:.3f}$$",
        "\\begin{{align}}S &= 0 + \\sqrt[{p}]{{{a}}}\\\\ &= {v:.2f}\\end{{align}}",
        "Therefore the sum is **{v:.2f}**, i.e. \\boxed{{{v:.2f}}}",
    ]
    number = draw.choice(["", "{n}. ", "Step {n}: ", "**Step {n}.** ", "({n}) "])
    steps = []
    for n in range(1, draw.randint(2, 12)):
        step = draw.choice(wordings).format(p=b - 1, a=a, v=a ** (1 / b))
        steps.append(number.format(n=n) + step)
    return Solution(problem, steps)


def _trace(draw: random.Random) -> Solution:
    """A reasoning model's trace: doubts, lists and displays, some paragraphs of several lines."""
    n = draw.randint(10, 999)
    problem = f"How many positive divisors does {n} have?\nAnswer with a number"
    wordings = [
        "Okay, so I need the number of divisors of {n}. Let me think...",
        "Wait, {n} = {d} * {q} + {r}? Hmm, let me check that again.",
        "- First, {d}: no.\n- Second, {e}: {q}·{e} ≠ {n}.\n\t* so neither",
        "\\[\n\\tau({n}) = \\prod_i (e_i + 1)\n\\]",
        "But wait... what if I'm wrong? 🤔 I'd say it's fine — \"really\" fine.",
        "### Final Answer\nThe answer is \\(\\boxed{{{q}}}\\)",
        "So, that's it.   Two  spaces,\tand a tab.",
    ]
    steps = []
    for _ in range(draw.randint(2, 14)):
        d = draw.randint(2, 9)
        steps.append(draw.choice(wordings).format(n=n, d=d, e=d + 1, q=n // d, r=n % d))
    return Solution(problem, steps)


def _chinese(draw: random.Random) -> Solution:
    a = draw.randint(3, 80)
    b = draw.randint(3, 80)
    problem = f"小明有{a}个苹果，又买了{b}个，一共有多少个？"
    wordings = [
        "步骤{n}：先看题目，小明原来有{a}个苹果。",
        "第{n}步，又买了{b}个，所以 {a}+{b}={c}。",
        "解：设总数为$x$，则$x={a}+{b}$。",
        "因此，答案是\\boxed{{{c}}}",
    ]
    steps = []
    for n in range(1, draw.randint(2, 7)):
        steps.append(draw.choice(wordings).format(n=n, a=a, b=b, c=a + b))
    return Solution(problem, steps)


def _code(draw: random.Random) -> Solution:
    k = draw.randint(1, 9)
    problem = f"Write `f(n)`, the sum of the multiples of {k} below n:"
    steps = [
        f"We loop over multiples of {k}.",
        f"```python\ndef f(n):\n    t = 0\n    for i in range(0, n, {k}):\n        t += i\n\n    return t\n```",
        f"{{'n': 10, \"f\": {sum(range(0, 10, k))}}}",
        f"Complexity: O(n/{k}); done",
    ]
    return Solution(problem, steps[: draw.randint(1, 4)])


@functools.cache
def solutions(number: int = 386, seed: int = 15) -> list[Solution]:
    """Problems with the steps of their solutions, none with white space at its ends; the same every time."""
    draw = random.Random(seed)
    return [draw.choice([_gsm8k, _prmbench, _trace, _chinese, _code])(draw) for _ in range(number)]
