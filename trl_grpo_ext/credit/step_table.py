"""The table of completions in the terminal, with each step on a line of its own, beside what it earned."""

import math
import random
import unicodedata
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Ends and middle of the colours of advantages, as in the report: orange and blue differ to colour-blind eyes too, and
# all three can be read on black and on white
_NEGATIVE = (214, 104, 0)
_ZERO = (128, 128, 128)
_POSITIVE = (64, 132, 224)

# What a column takes beside its text: a space on each side and a line
_FRAME = 3
# Without it Persian is hard to read; it has no width
_ZERO_WIDTH_NON_JOINER = "\u200c"
# In a terminal that reorders right-to-left text, it keeps the number that follows such a text to its right
_LEFT_TO_RIGHT_MARK = "\u200e"


class StepLine(NamedTuple):
    """
    A line of the table: a step, what lies between steps, or what a tool wrote.

    Args:
        text (`str`):
            The text of its tokens.
        rewards_K (`list[float | None]` of length K):
            Sum of what each source gives to its tokens and counts; `None` where that is nothing.
        advantage (`float` or `None`):
            Mean over its tokens; `None` where they are not trained on.
    """

    text: str
    rewards_K: list[float | None]
    advantage: float | None


class CompletionSteps(NamedTuple):
    """
    The lines of a completion.

    Args:
        lines (`list[StepLine]`):
            Their texts join to the completion.
        has_steps (`bool`):
            Whether a source has found steps in it.
    """

    lines: list[StepLine]
    has_steps: bool


def step_lines(
    texts: Sequence[str],
    ends: Set[int],
    mask: Sequence[int],
    advantages: Sequence[float],
    rewards_KT: Sequence[Sequence[float]],
) -> list[StepLine]:
    """
    Cut a completion after each step, and where the text of a tool begins or ends.

    Args:
        texts (`Sequence[str]` of length T):
            The text of each token.
        ends (`Set[int]`):
            Each step's last token.
        mask (`Sequence[int]` of length T):
            1 for tokens that are trained on.
        advantages (`Sequence[float]` of length T):
            Of each token.
        rewards_KT (`Sequence[Sequence[float]]` of shape `(K, T)`):
            What counts of each source's rewards, NaN where there is none.
    """
    borders = {token for token in range(1, len(texts)) if mask[token] != mask[token - 1]}
    cuts = sorted({0, len(texts)} | borders | {end + 1 for end in ends})
    lines = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        given_K = [[value for value in rewards_T[start:stop] if value == value] for rewards_T in rewards_KT]
        lines.append(
            StepLine(
                text="".join(texts[start:stop]),
                rewards_K=[sum(given) if given else None for given in given_K],
                advantage=sum(advantages[start:stop]) / (stop - start) if mask[start] else None,
            )
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Text


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""
    A text whose characters stand where they are written: any other becomes its escape, such as `\x1b` or `\u202e`.

    Args:
        text (`str`):
            Anything.
        encoding (`str`, *optional*, defaults to `"utf-8"`):
            Of the terminal. A character that it lacks becomes its escape too.
    """
    kept = (" ", "\n", _ZERO_WIDTH_NON_JOINER)
    text = "".join(c if c in kept or c.isprintable() else repr(c)[1:-1] for c in text.expandtabs(4))
    return text.encode(encoding, "backslashreplace").decode(encoding)


def prompt_text(prompt: Any) -> str:
    """A prompt as text: as it is, or each message of a conversation after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_message_text(message)}" for message in prompt)


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = " ".join((part["text"] or "") if part["type"] == "text" else f"[{part['type']}]" for part in content)
    calls = [str(call.get("function", call)) for call in message.get("tool_calls") or []]
    return " ".join([content, *calls] if content else calls)


def number_text(value: float | None, sign: str = "") -> str:
    """Two decimals as TRL has them, or three digits of a large number; nothing for `None` and NaN."""
    if value is None or value != value:
        return ""
    return format(value, f"{sign}.2f" if abs(value) < 1000 else f"{sign}.3g")


def advantage_colour(advantage: float, largest: float) -> str:
    """
    The colour of an advantage between orange, grey and blue, as `#rrggbb`.

    Args:
        advantage (`float`):
            The advantage.
        largest (`float`):
            The largest absolute value, which has the full colour.
    """
    # 0 for what is not finite, too
    share = abs(advantage) / largest if 0 < largest < math.inf and abs(advantage) <= largest else 0.0
    end = _POSITIVE if advantage > 0 else _NEGATIVE
    mixed = [round(middle + share * (full - middle)) for middle, full in zip(_ZERO, end, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


# ---------------------------------------------------------------------------------------------------------------------
# Table


class _Row(NamedTuple):
    """A row of the table: a text, its numbers, and their style; a prompt has no numbers."""

    text: str
    rewards: Sequence[str]
    advantage: str
    style: str


def print_steps(
    logs: Mapping[str, Any],
    completions: Sequence[CompletionSteps],
    step: int,
    num_samples: int | None,
    console: "Console | None" = None,
) -> None:
    """
    Print completions with their steps.

    Args:
        logs (`Mapping[str, Any]`):
            TRL's `_logs`: prompts, rewards, advantages and extra columns of the same completions.
        completions (`Sequence[CompletionSteps]`):
            Their lines.
        step (`int`):
            The optimizer step.
        num_samples (`int` or `None`):
            How many to print, drawn at random as TRL draws them; `None` for all.
        console (`rich.console.Console`, *optional*):
            Where to; by default the standard output, without colours if that is no terminal.
    """
    from rich.console import Console

    shown: Sequence[int] = range(len(completions))
    if num_samples is not None and num_samples < len(completions):
        shown = sorted(random.sample(shown, max(num_samples, 0)))
    if not shown:
        return
    largest = max((abs(line.advantage or 0.0) for row in shown for line in completions[row].lines), default=0.0)
    sections = []
    previous = None
    for row in shown:
        prompt = prompt_text(logs["prompt"][row])
        heading = [] if prompt == previous else [_Row(prompt, (), "", "bold")]
        sections.append(heading + [_line_row(line, largest) for line in completions[row].lines] + _rest(logs, row))
        previous = prompt
    console = Console() if console is None else console
    # Clears the training's progress bar, which would share a line with the table, and draws it again below
    with tqdm.external_write_mode():
        console.print(_table(f"Step {step}", list(logs["rewards"]), sections, console))


def _line_row(line: StepLine, largest: float) -> _Row:
    style = "dim" if line.advantage is None else advantage_colour(line.advantage, largest)
    return _Row(line.text, [number_text(reward) for reward in line.rewards_K], number_text(line.advantage, "+"), style)


def _rest(logs: Mapping[str, Any], row: int) -> list[_Row]:
    """What TRL prints beside a completion: its rewards and advantage, and columns of `log_extra`."""
    rewards = [number_text(values[row]) for values in logs["rewards"].values()]
    whole = _Row("= completion", rewards, number_text(logs["advantages"][row], "+"), "italic")
    return [whole, *(_Row(f"{name}: {values[row]}", (), "", "dim") for name, values in logs["extra"].items())]


def _table(title: str, names: list[str], sections: Sequence[Sequence[_Row]], console: "Console") -> "Table":
    """
    A column for the text, one for each source, and one for the advantage.

    Where the numbers would leave less than half of the width to the text, one column holds the rewards by name.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [row for section in sections for row in section]
    width = console.width // 2 - _FRAME - max(len(row.advantage) for row in rows)
    longest = [max((len(row.rewards[k]) for row in rows if row.rewards), default=0) for k in range(len(names))]
    # Spread over the columns, for the names above the numbers
    spare = (width - sum(longest) - _FRAME * len(names)) // len(names)
    if spare < 0:
        sections = [[_by_name(row, names) for row in section] for section in sections]
        names = ["Rewards"]
        longest = [console.width // 3]

    def text(value: str, style: str = "", mark: str = "") -> Text:
        return Text(mark + printable(value, console.encoding), style=style, overflow="fold")

    table = Table(title=title, title_style="bold", title_justify="left", expand=True)
    table.add_column("Step", overflow="fold", ratio=1)
    for name, cells in zip(names, longest, strict=True):
        table.add_column(text(name), overflow="fold", justify="right", max_width=cells + max(spare, 0))
    table.add_column("Adv.", justify="right", no_wrap=True)
    for section in sections:
        for row in section:
            shown = text(row.text.strip("\n"), row.style)
            reordered = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown.plain)
            mark = _LEFT_TO_RIGHT_MARK if reordered else ""
            numbers = [*(row.rewards or [""] * len(names)), row.advantage]
            table.add_row(shown, *(text(number, row.style, mark if number else "") for number in numbers))
        table.add_section()
    return table


def _by_name(row: _Row, names: Sequence[str]) -> _Row:
    named = zip(names, row.rewards, strict=False)
    return row._replace(rewards=["\n".join(f"{name} {number}" for name, number in named if number)])
