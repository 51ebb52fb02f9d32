"""Which pieces of a text say nothing by themselves: rules, headings and labels."""

import re

from .numbering import begins_with_label, is_label


_HEADING = re.compile(r"[ \t>]*(?:#[ \t]|#{2,6}).*")
_SYMBOLS = re.compile(r"[\W_]*")
# A number, an equals sign or the end of a sentence within it makes it a statement
_BOLD_TITLE = re.compile(r"[ \t>]*(\*\*|__)[^*_\d=.!?。:：]+[:：]?\1[:：]?\s*")
_BOLD = re.compile(r"[ \t>]*\*\*(?P<inner>[^*]+)\*\*[:：]?\s*")


def says_something(piece: str, by_number: bool = False) -> bool:
    """
    Whether a piece of a text says something by itself.

    These lines do not: symbols alone such as `---`, a Markdown heading, a label such as `Step 3:` or `**2.**`, and a
    title in bold such as `**Solution**` or `**Step 3: Add them up**`.

    Args:
        piece (`str`):
            One or more lines.
        by_number (`bool`, *optional*, defaults to `False`):
            Whether steps are those that have numbers. Then `### Step 3: Add them up` is all that such a step says.
    """
    return not all(_is_heading(line, by_number) for line in piece.split("\n"))


def _is_heading(line: str, by_number: bool) -> bool:
    if _SYMBOLS.fullmatch(line) or is_label(line):
        return True
    bold = _BOLD.fullmatch(line)
    if _HEADING.fullmatch(line) or (bold and begins_with_label(bold["inner"])):
        return not (by_number and begins_with_label(line))
    return _BOLD_TITLE.fullmatch(line) is not None
