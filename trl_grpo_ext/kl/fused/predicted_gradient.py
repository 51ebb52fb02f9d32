"""The gradient of the loss that is known before the loss."""

from collections.abc import Callable

import torch


# From log-probs `(m,)` and the slice of the M tokens that they belong to, to the gradients of the loss with respect to
# those tokens' `logp` and `kl`, up to one factor for all M tokens
PredictedGradient = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


class SecondPassCount:
    """Counts the tokens of backward passes, and those of them that went through the LM head a second time."""

    def __init__(self):
        self._second_pass_tokens = 0
        self._tokens = 0

    def add(self, second_pass_tokens: int, tokens: int) -> None:
        self._second_pass_tokens += second_pass_tokens
        self._tokens += tokens

    def take(self) -> tuple[int, int]:
        """Tokens that took the second pass and all tokens, since the last call."""
        counts = (self._second_pass_tokens, self._tokens)
        self.__init__()
        return counts
