"""
Where the numbered steps of a text begin, such as "Step 2:", "步骤2", "2." or "### Step 2".

| line | begins a step |
|---|---|
| a word for a step and its number, then a colon, a period, a bracket, a dash or the end of the line | always |
| the same in a heading or in bold, whatever follows | always |
| a number with a period, a bracket, a colon or a comma that lists have | where the numbers count 1, 2, ... |

Numbers count if the text has no line of the first two kinds. Then those are taken that are written alike, so that a
list within a step is none: the same indentation, the same marks around the number. Of several ways to write them that
count, the one that begins first is taken. A number within a line, a decimal and a year begin nothing.
"""

import re
from collections.abc import Sequence


# Words for a step, and the way that Chinese counts them
STEP_WORDS = (
    *("step", "schritt", "étape", "etape", "paso", "passo", "stap", "krok", "adım", "шаг", "bước", "langkah"),
    *("步骤", "步驟", "ステップ", "手順", "단계", "الخطوة", "خطوة", "चरण"),
)
_NUMBER = r"(?:\d{1,3}|[一二三四五六七八九十]{1,3})"
# French has a space before a colon that does not break
_BLANK = r"[ \t\u00a0\u202f]"
_CHINESE = rf"第{_BLANK}*{_NUMBER}{_BLANK}*步"
_WORD = rf"(?:{'|'.join(STEP_WORDS)}){_BLANK}*(?:[#(（-]{_BLANK}*)?{_NUMBER}"
# "Step 1/3", "Step 1 of 3"
_OF_ALL = rf"(?:{_BLANK}*/{_BLANK}*\d{{1,3}}|{_BLANK}+of{_BLANK}+\d{{1,3}})?"
_LABEL = rf"(?:{_WORD}|{_CHINESE}|\d{{1,3}}{_BLANK}*단계)(?!\d|[.．]\d){_OF_ALL}"
# "Step 1 (setup):", "Step 1 [setup]:"
_TITLE = rf"(?:{_BLANK}*[(（\[][^()（）\[\]\n]{{1,80}}[)）\]])?"
# Headings, quotes, bold and bullets, and the marks of the direction of writing
_MARKS = r"[#>*_•\u200e\u200f \t-]*"
_END = r"(?:[*_ \t\u00a0\u202f]*(?:[:：.．;；、)）\]】]|[-–—]+[ \t]|\r?$))"

_WORDED = re.compile(
    rf"^{_MARKS}[(（\[【]?{_LABEL}{_TITLE}{_END}|^{_MARKS}{_CHINESE}(?=[，,\s])"
    rf"|^[>_•\u200e\u200f \t-]*(?:#|\*\*){_MARKS}{_LABEL}",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(
    rf"^(?P<before>{_MARKS}[(（\[]?)(?P<number>\d{{1,3}})(?P<after>[*_]*(?:[.．:：、)）\]](?!\d)|-(?=[ \t])))",
    re.MULTILINE,
)
# A line of the first kinds, or of a number, that says nothing more; a minus sign is no bullet
_LABEL_ALONE = re.compile(
    rf"{_MARKS}[(（\[【]?{_LABEL}[\W_]*|[#>*_ \t]*[(（\[]?\d{{1,3}}[.．:：、)）\]][*_\s]*", re.IGNORECASE
)


def numbered_starts(text: str) -> list[int]:
    """
    The characters at which numbered steps begin, each at the start of a line.

    Args:
        text (`str`):
            Text of a completion, without code.
    """
    worded = [match.start() for match in _WORDED.finditer(text)]
    if worded:
        return worded
    alike: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for match in _NUMBERED.finditer(text):
        alike.setdefault((match["before"], match["after"]), []).append((match.start(), int(match["number"])))
    return min(filter(None, map(_counting, alike.values())), default=[])


def is_label(line: str) -> bool:
    """Whether a line is the number of a step and nothing else."""
    return _LABEL_ALONE.fullmatch(line) is not None


def begins_with_label(line: str) -> bool:
    """Whether a line begins with the number of a step."""
    return bool(_WORDED.match(line) or _NUMBERED.match(line))


def _counting(numbers: Sequence[tuple[int, int]]) -> list[int]:
    """The starts of those numbers that count 1, 2, ..., once or again and again."""
    runs: list[list[int]] = []
    for start, number in numbers:
        if number == 1:
            runs.append([start])
        elif runs and number == len(runs[-1]) + 1:
            runs[-1].append(start)
    return [start for run in runs if len(run) > 1 for start in run]
