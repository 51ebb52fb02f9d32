"""
The task: `a=7,b=3,c=5:b*c+a` is a problem; its answer is the sum of the value's digits.

The policy first calls a tool, `calculator(expression=3*5+7)`, and is told `22`. Then it answers `4`. A solution is a
conversation, in messages. A completion is what the policy generates and is told: token ids.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


VARIABLES = "abcd"
NUM_OPERANDS = 3
EOS = "<eos>"
MAX_TURN_LENGTH = 16
# A call has 12 tokens, what the tool says at most 5, and an answer 3. The rest is for the text of a tool's error
MAX_COMPLETION_LENGTH = 48

Message = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def make_problem(rng: random.Random) -> str:
    """Values of four variables, and an expression of three of them: `a=7,b=3,c=5,d=4:b*d+a`."""
    values = ",".join(f"{variable}={rng.randint(1, 9)}" for variable in VARIABLES)
    first, *others = rng.sample(VARIABLES, NUM_OPERANDS)
    expression = first + "".join(rng.choice("+*") + variable for variable in others)
    return f"{values}:{expression}"


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


def split_problems(seed: int, **sizes: int) -> Problems:
    """Draw as many problems as each purpose needs."""
    source = distinct_problems(seed)
    return Problems(**{name: list(islice(source, sizes[name])) for name in Problems._fields})


# ---------------------------------------------------------------------------------------------------------------------
# The tool, and what is right


def calculator(expression: str) -> str:
    """
    Evaluate an expression.

    Args:
        expression: Sums and products of whole numbers, such as `3*5+7`.

    Returns:
        The value.
    """
    if not re.fullmatch(r"\d+([+*]\d+)*", expression):
        raise ValueError("malformed")
    return str(sum(prod(map(int, term.split("*"))) for term in expression.split("+")))


def right_expression(problem: str) -> str:
    """`a=7,b=3,c=5,d=4:b*d+a` -> `3*4+7`."""
    values, expression = problem.split(":")
    for assignment in values.split(","):
        variable, value = assignment.split("=")
        expression = expression.replace(variable, value)
    return expression


def right_answer(value: str) -> str:
    """What to answer where the tool says `value`."""
    return str(sum(map(int, value)))


def call_message(expression: str) -> Message:
    """The policy's message that calls the calculator."""
    function = {"name": calculator.__name__, "arguments": {"expression": expression}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def question(problem: str) -> list[Message]:
    """The conversation as the policy finds it."""
    return [{"role": "user", "content": problem}]


def worked_solution(problem: str) -> list[Message]:
    """The conversation in which call and answer are right."""
    expression = right_expression(problem)
    value = calculator(expression)
    return [
        *question(problem),
        call_message(expression),
        {"role": "tool", "name": calculator.__name__, "content": value},
        {"role": "assistant", "content": right_answer(value)},
    ]


def is_right_call(problem: str, completion: Sequence[Message]) -> bool:
    """Whether the first of a completion's messages is a call of the calculator with the problem's expression."""
    return completion[0].get("tool_calls") == call_message(right_expression(problem))["tool_calls"]


def is_right_answer(problem: str, completion: Sequence[Message]) -> bool:
    """Whether the last of a completion's messages is the problem's answer, however the policy came by it."""
    expected = right_answer(calculator(right_expression(problem)))
    return completion[-1]["role"] == "assistant" and completion[-1]["content"] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

# Each message is its role and its content. Only the policy's messages end with the end of sequence, because only the
# policy has to write it
CHAT_TEMPLATE = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<call>' + call.function.name + '(' }}
        {%- for name, value in call.function.arguments.items() %}{{ name + '=' + value }}{% endfor %}
        {{- ')' }}
    {%- endfor %}{{ '<eos>' }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

# The other way round: from the policy's text to a message. TRL finds the calls of tools by it
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call>(?P<name>\w*)\(",
            "close": [")", EOS],
            "repeats": True,
            "content": "kv-lines",
            "content_args": {"line_sep": ",", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": EOS, "content": "text"},
    },
}

ROLES = ("<tools>", "<user>", "<assistant>", "<tool>", "<call>")
WORDS = (calculator.__name__, "expression")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, marker and word of the tool's call."""
    tokens = ["<pad>", "<bos>", EOS, "<unk>", *ROLES, *WORDS, *VARIABLES, *"0123456789+*=,:()"]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*ROLES, EOS, *WORDS, "."])), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=EOS,
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


TOKENIZER = build_tokenizer()
