"""A process reward source for written arithmetic: a step is a line with an equation, right if that holds."""

import ast
import re
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from typing import Any

from trl_grpo_ext import step_reward


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
    ast.UAdd: pos,
    ast.USub: neg,
}
NUMBER = r"\d+(?:\.\d+)?"
SUM = rf"[-+]?{NUMBER}(?:[-+*/][-+]?{NUMBER})*"
# A match inside a longer expression, "(1+2)*3+4=13" read from the 3, would be judged wrongly: look at both sides.
EQUATIONS = re.compile(rf"(?<![\w.)*/+-]){SUM}(?:={SUM})+(?![\w(]|[-+*/][\w(])")
LONGEST_EQUATION = 200


@step_reward(by="newline")
def equations_hold(steps: list[str]) -> list[float | None] | None:
    """
    Judges each line of a completion that holds an equation such as `4 + 9 = 13`, by computing both sides exactly.

    A line earns 1 if all its equations hold and not all of them stand on an earlier line, otherwise 0. A line without
    an equation, or with letters or brackets inside one, is not scored (`None`). A completion without any scored line
    is not judged.

    Right but pointless equations earn 1 too, and a policy that is paid for each learns to write as many as fit. Use
    `reward_transforms: [clip, ...]`, under which a right line costs nothing and a wrong one 0.5, beside a source that
    judges the answer.
    """
    seen: set[str] = set()
    rewards: list[float | None] = []
    for line in steps:
        verdicts = judge_equations(line)
        if verdicts:
            rewards.append(float(all(verdicts.values()) and not verdicts.keys() <= seen))
            seen.update(verdicts)
        else:
            rewards.append(None)
    return None if all(reward is None for reward in rewards) else rewards


def judge_equations(line: str) -> dict[str, bool]:
    """Each equation on the line, without spaces, and whether all of its sides are equal."""
    found = {}
    for equation in EQUATIONS.findall(squeeze(line)):
        if len(equation) <= LONGEST_EQUATION and re.search(r"\d[-+*/]", equation):
            values = [evaluate(side) for side in equation.split("=")]
            if None not in values:
                found[equation] = len(set(values)) == 1
    return found


def squeeze(line: str) -> str:
    """Plain signs, without a bullet, bold marks, thousands separators or the spaces around operators."""
    line = line.translate(str.maketrans("×÷−–", "*/--"))
    line = re.sub(r"^\s*[-*•]\s+|(?<!\d)\*\*|\*\*(?!\d)", "", line)
    line = re.sub(r"(?<=\d),(?=\d{3}\b)", "", line)
    return re.sub(r"\s*([-+*/=])\s*", r"\1", line)


def evaluate(expression: str) -> Fraction | None:
    """Exact value of a sum of products of numbers; `None` if it has none (division by zero, a leading zero)."""
    try:
        return fold(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def fold(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](fold(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](fold(left), fold(right))
    raise SyntaxError(f"not an arithmetic expression: {ast.dump(node)}")
