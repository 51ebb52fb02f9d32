"""Progress bars of scoring that takes long."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm


_DELAY_SECONDS = 10.0

# Outside of a trainer they are shown. Coroutines see the value that holds where they are started
_are_shown: ContextVar[bool] = ContextVar("are_shown", default=True)


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Whether reward models show a bar inside the context: in one process, and not with `disable_tqdm`."""
    token = _are_shown.set(shown)
    try:
        yield
    finally:
        _are_shown.reset(token)


def scoring_bar(total: int, name: str, unit: str) -> tqdm:
    """
    A bar that appears after 10 seconds, and leaves nothing behind.

    Args:
        total (`int`):
            How many units are to be scored.
        name (`str`):
            Of the reward model.
        unit (`str`):
            Of what.

    Returns:
        `tqdm`: a context manager, to be updated with each unit that is scored.
    """
    return tqdm(
        total=total, desc=name, unit=f" {unit}", delay=_DELAY_SECONDS, leave=False, disable=not _are_shown.get()
    )
