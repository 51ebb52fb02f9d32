"""Errors of chat templates, with the name of what was given to them."""

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError


@contextmanager
def template_errors_named(source: str) -> Iterator[None]:
    """
    Raise `ValueError` in place of an error of a chat template, such as "System role not supported".

    Args:
        source (`str`):
            Names the reward model.
    """
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"{source}: its chat template refuses the conversation: {error}. Some templates take no system message, "
            "no tools, or no two messages of one role in a row. The conversation is the preset's system message, the "
            "problem and the solution. problem='last_user', a column or a function of yours gives another problem, "
            "and a preset of yours another system message."
        ) from error
