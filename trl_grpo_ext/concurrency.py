"""Coroutines that run at the same time."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar


_Result = TypeVar("_Result")


async def run_together(coroutines: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of coroutines that run at the same time, in order; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # A cancelled task may still have something to close
        await asyncio.gather(*tasks, return_exceptions=True)
