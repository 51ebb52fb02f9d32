"""A process reward source for written arithmetic: a step is a line with an equation, right if that holds."""

import ast
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from trl_grpo_ext import StepRewards


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


class EquationSteps:
    """
    Judges each line of a completion that holds an equation such as `4 + 9 = 13`, by computing both sides exactly.

    A step is such a line. It earns 1 if all its equations hold and not all of them stand on an earlier line, otherwise
    0; its reward sits on the token that completes the line's text. Lines without an operator or with letters or
    brackets inside the equation are not judged, nor is a completion without any judged line (`None`).

    Right but pointless equations earn 1 too, and a policy that is paid for each learns to write as many as fit. Use
    `reward_transforms: [clip, ...]`, under which a right line costs nothing and a wrong one 0.5, beside a source that
    judges the answer.

    Reward functions get token ids but no tokenizer, and text is mapped to tokens with the policy's own; this is why it
    is a class. `recipes/grpo.py` builds a class named in `reward_funcs` with the policy's tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            The policy's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer.backend_tokenizer

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[StepRewards | None]:
        return [self.judge(ids) for ids in completion_ids]

    def judge(self, ids: Sequence[int]) -> StepRewards | None:
        """Step rewards of one completion's token ids, or `None` if no line can be judged."""
        text, token_ends = decode_with_ends(self.tokenizer, ids)
        rewards: dict[int, float] = {}
        for end, reward in line_rewards(text):
            token = bisect_left(token_ends, end)
            # Two lines that end inside one token are one step, as right as the worse of them.
            rewards[token] = min(reward, rewards.get(token, reward))
        return StepRewards(ends=list(rewards), values=list(rewards.values())) if rewards else None


def decode_with_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """
    Decode token by token and say where in the text each token ends; special tokens have no text.

    A character whose bytes are split over several tokens belongs to the last of them. Bytes that never become a
    character at the end of `ids` are left out.

    Returns:
        `tuple[str, list[int]]`: the text, and for each token the number of characters up to its end (not decreasing).
    """
    stream = DecodeStream(skip_special_tokens=True)
    text, ends = "", []
    for token in ids:
        text += stream.step(tokenizer, token) or ""
        ends.append(len(text))
    return text, ends


def line_rewards(text: str) -> list[tuple[int, float]]:
    """Position after the last visible character of each line that holds equations, and the line's reward."""
    seen: set[str] = set()
    rewards, start = [], 0
    for line in text.splitlines(keepends=True):
        verdicts = judge_equations(line)
        if verdicts:
            right = all(verdicts.values()) and not verdicts.keys() <= seen
            rewards.append((start + len(line.rstrip()), float(right)))
            seen.update(verdicts)
        start += len(line)
    return rewards


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
