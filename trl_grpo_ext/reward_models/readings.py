"""Readings: from a head's outputs, or from the vocabulary, to one score per read position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LabelSoftmax:
    """`sum_{o in indices} softmax(logits)_o`: the probability of the good labels, in [0, 1]."""

    indices: Sequence[int] = (1,)

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        """One score per row."""
        return logits_RO.softmax(-1)[:, list(self.indices)].sum(-1)


@dataclass(frozen=True)
class Sigmoid:
    """`sigmoid(logit)` of a head with one output, in [0, 1]."""

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        """One score per row."""
        return logits_RO[:, 0].sigmoid()


@dataclass(frozen=True)
class SequenceScalar:
    """The single output itself, unbounded."""

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        """One score per row."""
        return logits_RO[:, 0]


@dataclass(frozen=True)
class TokenPair:
    """
    `p(good) / (p(good) + p(bad)) = sigmoid(h . (W_good - W_bad))`: two rows of the head, no logits of the vocabulary.

    Args:
        good, bad (`str`):
            The two answers, each exactly one id where it follows other text.
    """

    good: str = "+"
    bad: str = "-"


@dataclass(frozen=True)
class LogRatio:
    """
    Implicit rewards: `beta * sum_{t <= k} (log p(y_t) - log p_ref(y_t))` over the answer up to the read position k.

    Unbounded; from arXiv 2412.01981.
    """

    beta: float = 0.001


HeadReading = LabelSoftmax | Sigmoid | SequenceScalar

Reading = HeadReading | TokenPair | LogRatio
