"""What is said about the steps of a reward source, once and by name, where training would go on without a sign."""

from .sources import RewardSource, StepCounts
from .types import PreparableSource


# Characters of a completion that a warning shows
_EXCERPT = 200


class StepWarnings:
    """
    What has been said about the steps of each source.

    Args:
        is_outcome (`bool`):
            Whether supervision is by outcome, under which steps become one number.
    """

    def __init__(self, is_outcome: bool):
        self._is_outcome = is_outcome
        self._said: set[str] = set()
        # Sources that have found several steps in a completion: where they end is known to them
        self._found_several: set[str] = set()

    def of_batch(self, source: RewardSource, counts: StepCounts, completions: int, first: str) -> str | None:
        """
        What there is to say after a batch.

        Args:
            source ([`~trl_grpo_ext.rewards.sources.RewardSource`]):
                The source.
            counts ([`~trl_grpo_ext.rewards.sources.StepCounts`]):
                Its steps in the batch of all processes.
            completions (`int`):
                Number of completions of all processes.
            first (`str`):
                A completion, to be shown.

        Returns:
            `str` or `None`: the warning; `None` if there is nothing to say that has not been said.
        """
        if counts.with_several:
            self._found_several.add(source.name)
        about = self._about(source, counts, completions, repr(first[:_EXCERPT]))
        if about is None or source.name in self._said:
            return None
        self._said.add(source.name)
        return f"reward source '{source.name}' {about} This is said once."

    def _about(self, source: RewardSource, counts: StepCounts, completions: int, first: str) -> str | None:
        if completions == counts.without_step:
            return (
                f"found no step in any of {completions} completions, so that it rewards nothing. The first completion "
                f"is {first}. Do the steps end otherwise? See `Segmentation`."
            )
        if counts.steps and self._is_outcome and not source.chose_reduce:
            return (
                f"returned rewards of steps, and supervision='outcome' trains on their {source.reduce}, which pays "
                "for more steps. Use supervision='process', or give the function an attribute `reduce`."
            )
        # Of the sources that cut the text themselves; a function that returns `StepRewards` knows its steps
        cuts_text = isinstance(source.function, PreparableSource)
        if cuts_text and counts.steps and source.name not in self._found_several:
            return (
                f"found a single step in each of the {counts.steps} completions that it judges, out of {completions}, "
                f"so that its reward is one for the whole completion. The first completion is {first}. Do the steps "
                "end otherwise? See `Segmentation`. Where completions have a single step, nothing is wrong."
            )
        return None
