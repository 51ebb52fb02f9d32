"""One forward for several reward models: the scores that one of them has made for the others."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from .rendering import Rendered


class SharesInputs(Protocol):
    """A reward model as [`SharedScores`] sees it."""

    def inputs_key(self) -> tuple[Any, ...]:
        """All that decides which input a solution becomes, and what the backbone makes of it."""
        ...


# One score for each score position of each solution
_Scores = list[list[float]]
_SolutionKey = tuple[tuple[int, ...], int, tuple[int, ...]]


class SharedScores:
    """
    The scores that the reward models over one backbone have made for each other.

    Reward models whose `inputs_key` is the same turn a solution into the same input. The first of them that is asked
    for a batch runs the backbone, and scores the batch for all of them. The scores of the others are stored here until
    they are asked for the same batch.

    Each reward model has the scores of one batch at most, so that none pile up for a reward model that is never asked.
    """

    def __init__(self):
        # In the order of their creation. It is the same in all processes, which must score them in the same order
        self._stored: WeakKeyDictionary[SharesInputs, dict[_SolutionKey, list[float]]] = WeakKeyDictionary()

    def register(self, reward_model: SharesInputs) -> None:
        """Add a reward model over the backbone."""
        self._stored[reward_model] = {}

    def score(
        self,
        reward_model: SharesInputs,
        solutions: Sequence[Rendered],
        run: Callable[[list[Rendered], list[SharesInputs]], list[_Scores]],
    ) -> _Scores:
        """
        Scores of solutions: those that are stored, and those of one run of the backbone for all the others.

        Args:
            reward_model:
                The reward model that is asked, registered here.
            solutions (`Sequence[Rendered]`):
                The solutions, of which equal ones are run once.
            run (`Callable`):
                Runs the backbone over its first argument, and returns the scores by each of the reward models in its
                second one.

        Returns:
            `list[list[float]]`: one score for each score position of each solution.
        """
        stored = self._stored[reward_model]
        self._stored[reward_model] = {}
        wanted = {_key(solution): solution for solution in solutions if solution.score_positions}
        missing = {key: solution for key, solution in wanted.items() if key not in stored}
        others = self._others(reward_model)
        own, *theirs = run(list(missing.values()), [reward_model, *others])
        # Another reward model has begun this batch, so what is stored of it for the others must stay
        is_begun = not wanted.keys().isdisjoint(stored)
        for other, scores in zip(others, theirs, strict=True):
            kept = self._stored[other] if is_begun else {}
            self._stored[other] = kept | dict(zip(missing, scores, strict=True))
        known = stored | dict(zip(missing, own, strict=True))
        return [known[_key(solution)] if solution.score_positions else [] for solution in solutions]

    def _others(self, reward_model: SharesInputs) -> list[SharesInputs]:
        """Those that the same inputs are for."""
        key = reward_model.inputs_key()
        return [other for other in self._stored if other is not reward_model and other.inputs_key() == key]


def _key(solution: Rendered) -> _SolutionKey:
    """All that a score depends on beside the reward model."""
    return tuple(solution.ids), solution.prompt_length, tuple(solution.score_positions)
