"""Gates: a source's rewards count only where another source, the outcome, is positive."""

from collections.abc import Sequence

import torch


NO_GATE = "none"


def gate_indices(gates: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """
    Index of the source that gates each source, `None` where there is no gate.

    Args:
        gates (`Sequence[str]`):
            For each source the name of the one that must be positive, or `"none"`.
        names (`Sequence[str]`):
            Names of the sources.

    Raises:
        ValueError: a name that no source or that several have, or a source that gates itself.
    """
    indices: list[int | None] = []
    for own, gate in enumerate(gates):
        if gate == NO_GATE:
            indices.append(None)
            continue
        found = [index for index, name in enumerate(names) if name == gate]
        if len(found) != 1:
            raise ValueError(
                f"outcome_gate[{own}] is '{gate}', the name of {len(found)} of the reward sources {', '.join(names)}; "
                "name one."
            )
        if found[0] == own:
            raise ValueError(f"outcome_gate[{own}]: '{gate}' cannot gate itself; name another source, or '{NO_GATE}'.")
        indices.append(found[0])
    return indices


def withheld_rewards(scores_NK: torch.Tensor, gates: Sequence[int | None]) -> torch.Tensor:
    """
    Where a source's reward is withheld, because its gate's reward is not positive or its gate does not judge.

    Args:
        scores_NK (`torch.Tensor` of shape `(N, K)`):
            One number per completion and source, NaN where there is none.
        gates (`Sequence[int | None]` of length K):
            What [`gate_indices`] returned.

    Returns:
        `torch.Tensor` of shape `(N, K)`, bool.
    """
    withheld_NK = torch.zeros_like(scores_NK, dtype=torch.bool)
    for k, gate in enumerate(gates):
        if gate is not None:
            # Also true for NaN
            withheld_NK[:, k] = ~(scores_NK[:, gate] > 0)
    return withheld_NK
