"""
Reward sources over the same completions, with their weights and discounts, and their loss tokens packed.

- A completion is the sequence of its loss tokens. Rewards on other tokens are ignored, and other tokens neither
  discount nor shift the ones that count.
- A source judges a completion if it puts a reward on at least one of its loss tokens. A completion that no source
  judges gets 0 and is absent from every mean and standard deviation.
- A source of weight 0 is absent from every formula. A completion that only such sources judge is not judged.
- A turn is a maximal run of loss tokens: what the policy wrote between the outputs of tools.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..rewards.turns import turn_ends
from .normalization import pack_order
from .returns import discounted_returns
from .settings import AdvantageSettings


class Sources(NamedTuple):
    """Reward sources over the same completions; any subset of them, or of the completions, is again one."""

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    weights_K: torch.Tensor
    gammas: list[float]
    gamma_unit: str
    group_size: int

    def rows(self, rows: slice) -> "Sources":
        """Those completions alone."""
        return self._replace(rewards_KNT=self.rewards_KNT[:, rows], mask_NT=self.mask_NT[rows])

    def without_weight_0(self) -> "Sources":
        """The others; multiplying by 0 would still let a source judge completions and end steps."""
        kept = [k for k, weight in enumerate(self.weights_K.tolist()) if weight != 0]
        if len(kept) == len(self.gammas):
            # Indexing copies
            return self
        return self._replace(
            rewards_KNT=self.rewards_KNT[kept],
            weights_K=self.weights_K[kept],
            gammas=[self.gammas[k] for k in kept],
        )

    def packed(self, dtype: torch.dtype, length: int | None = None) -> "PackedSources":
        """
        The same with the loss tokens first in each row, and NaN on all other tokens.

        Args:
            dtype (`torch.dtype`):
                Of the rewards.
            length (`int`, *optional*):
                The number of columns; by default the longest completion's number of loss tokens.
        """
        mask_NT = self.mask_NT
        longest = max(1, int(mask_NT.sum(1).max())) if length is None else length
        turn_ends_NT = turn_ends(mask_NT) if self.gamma_unit == "turn" else None
        rewards_KNT = self.rewards_KNT
        order_NT = None
        if (mask_NT[:, 1:] & ~mask_NT[:, :-1]).any():
            # Adjacent loss tokens are neighbours: tool output between them neither discounts nor shifts a token index
            order_NT = pack_order(mask_NT)[:, :longest]
            mask_NT = mask_NT.gather(1, order_NT)
            rewards_KNT = rewards_KNT.gather(2, order_NT.expand(len(rewards_KNT), -1, -1))
            turn_ends_NT = None if turn_ends_NT is None else turn_ends_NT.gather(1, order_NT)
        mask_NT = mask_NT[:, :longest]
        # With NaN as the only mark of "no reward", no formula below can read a reward outside the mask
        rewards_KNT = rewards_KNT[:, :, :longest].to(dtype).where(mask_NT, torch.nan)
        return PackedSources(
            rewards_KNT,
            mask_NT,
            self.weights_K.to(dtype),
            self.gammas,
            self.gamma_unit,
            None if turn_ends_NT is None else turn_ends_NT[:, :longest],
            self.group_size,
            order_NT,
        )


class PackedSources(NamedTuple):
    """[`Sources`] whose completions' loss tokens come first."""

    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor
    weights_K: torch.Tensor
    gammas: list[float]
    gamma_unit: str
    turn_ends_NT: torch.Tensor | None
    group_size: int
    # The tokens' columns before they were packed, where that moved any
    order_NT: torch.Tensor | None

    @property
    def given_NT(self) -> torch.Tensor:
        """True on tokens on which any source puts a reward."""
        return (~self.rewards_KNT.isnan()).any(0)

    def chosen(self, kept: list[int]) -> "PackedSources":
        """Some of the sources."""
        return self._replace(
            rewards_KNT=self.rewards_KNT[kept],
            weights_K=self.weights_K[kept],
            gammas=[self.gammas[k] for k in kept],
        )

    def single(self, k: int) -> "PackedSources":
        """Source k alone, with weight 1."""
        return self._replace(
            rewards_KNT=self.rewards_KNT[k : k + 1],
            weights_K=torch.ones_like(self.weights_K[k : k + 1]),
            gammas=self.gammas[k : k + 1],
        )

    def weighted_sum(self, of_source: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """`sum_k w_k x^k`, `(N, T)`; x of one source at a time, so that what makes it can go."""
        sum_NT = torch.zeros_like(self.rewards_KNT[0])
        for k, weight in enumerate(self.weights_K):
            sum_NT += weight * of_source(k)
        return sum_NT

    def returns(self, rewards_NT: torch.Tensor, k: int) -> torch.Tensor:
        """Returns, with source k's gamma, of rewards that are NaN where there is none."""
        ends_NT = ~rewards_NT.isnan() if self.gamma_unit == "step" else self.turn_ends_NT
        return discounted_returns(rewards_NT.nan_to_num(), self.gammas[k], ends_NT)

    def unpacked(self, packed: torch.Tensor, unpacked: torch.Tensor) -> torch.Tensor:
        """Values `(..., N, T)` put back at their tokens' places, into a tensor that may be longer."""
        if self.order_NT is None:
            unpacked[..., : packed.size(-1)] = packed
            return unpacked
        return unpacked.scatter_(-1, self.order_NT.expand_as(packed), packed)


def make_sources(
    rewards_KNT: torch.Tensor,
    mask_NT: torch.Tensor,
    weights_K: torch.Tensor,
    group_size: int,
    settings: AdvantageSettings,
) -> Sources:
    """
    The sources of [`~trl_grpo_ext.advantages.combine.process_advantages`], with its arguments.

    Raises:
        ValueError: shapes that do not fit.
    """
    shapes = [tuple(tensor.shape) for tensor in (rewards_KNT, mask_NT, weights_K)]
    if rewards_KNT.ndim != 3 or shapes[1] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(
            f"expected rewards (K, N, T), mask (N, T) and weights (K,); got {', '.join(map(str, shapes))}."
        )
    if group_size < 1 or rewards_KNT.size(1) % group_size:
        raise ValueError(f"{rewards_KNT.size(1)} completions do not divide into groups of {group_size}.")
    gammas = settings.gammas(len(weights_K))
    return Sources(rewards_KNT, mask_NT.bool(), weights_K, gammas, settings.gamma_unit, group_size)
