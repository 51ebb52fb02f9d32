"""
Process supervision, weighted reward sources and an exact KL for TRL's GRPO.

Swap two names, `GRPOTrainer` for [`GRPOExtTrainer`] and `GRPOConfig` for [`GRPOExtConfig`]; with every new field at
its default the training run is TRL's, bit for bit.

Shape suffixes used throughout the package (`rewards_KNT` is a tensor of shape `(K, N, T)`):

| suffix | axis |
|---|---|
| `N` | completions over all processes, in TRL's gathered order |
| `B` | completions of this process |
| `G` | completions of one prompt's group |
| `P` | prompts |
| `K` | reward sources |
| `S` | steps of a completion |
| `T` | completion tokens, padded |
| `H` | hidden size |
| `V` | vocabulary |
"""

from .config import GRPOExtConfig
from .reward_models.models import OutcomeRewardModel, ProcessRewardModel
from .rewards.types import StepRewards
from .trainer import GRPOExtTrainer


__all__ = ["GRPOExtConfig", "GRPOExtTrainer", "OutcomeRewardModel", "ProcessRewardModel", "StepRewards"]
__version__ = "0.1.0"
