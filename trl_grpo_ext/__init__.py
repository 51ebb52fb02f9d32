"""
Process supervision, weighted reward sources and an exact KL for TRL's GRPO.

Swap two names, `GRPOTrainer` for [`GRPOExtTrainer`] and `GRPOConfig` for [`GRPOExtConfig`]; with every new field at
its default the training run is TRL's, bit for bit.

The folders, one for each promise:

| folder | what it holds |
|---|---|
| `rewards` | what a reward source may return, and the sources of one batch |
| `steps` | from text to steps, and from steps to the policy's tokens |
| `advantages` | from token rewards of several sources to group-relative advantages |
| `kl` | the KL estimates, the exact KL with its fused head, and the reference |
| `reward_models` | reward models from checkpoints and behind HTTP, and language models as judges |
| `checkpoints` | checkpoints from which a run goes on as if it had not ended |
| `credit` | what each token earned and why, in files and in a report |

The trainer is a chain of subclasses, each in a file of its own: `KLTrainer` (`kl/trainer.py`), `CheckpointedTrainer`
(`checkpoints/trainer.py`), `ModelCardTrainer` (`model_card.py`), `CreditTrainer` (`credit/trainer.py`),
`ScoringTrainer` (`scoring.py`), and last `GRPOExtTrainer` (`trainer.py`), where rewards become advantages.
`config.py` holds the settings, `loss.py` what mirrors TRL's loss, and `_trl.py` everything that is used of TRL.

Shape suffixes used throughout the package (`rewards_KNT` is a tensor of shape `(K, N, T)`):

| suffix | axis |
|---|---|
| `N` | completions over all processes, in TRL's gathered order, or those of some groups |
| `B` | completions of this process |
| `G` | completions of one prompt's group |
| `P` | prompts |
| `K` | reward sources |
| `T` | completion tokens, padded |
| `S` | steps of a completion, padded |
| `U` | turns of a completion, as many as have metrics |
| `M` | tokens of any completions, one after the other, without padding |
| `L` | tokens of a whole padded input, prompt and completion |
| `R` | score positions of a batch |
| `O` | outputs of a head |
| `H` | hidden size |
| `V` | vocabulary |

A digit is an axis of that size.
"""

from .advantages.estimators import ESTIMATORS, Estimator
from .config import GRPOExtConfig
from .kl.divergences import DIVERGENCES, Divergence
from .reward_models.models import OutcomeRewardModel, ProcessRewardModel
from .reward_models.opening import load_reward_model, open_reward_models
from .reward_models.presets import Preset
from .reward_models.remote.client import RemoteOutcomeRewardModel, RemoteProcessRewardModel
from .reward_models.remote.judge import JudgeOutcome, JudgeSteps
from .reward_models.remote.judge_formats import JUDGE_FORMATS, JudgeFormat, rubric_format
from .rewards.scored_batch import ScoredBatch
from .rewards.turns import TurnRewards
from .rewards.types import StepRewards
from .steps.segmentation import Segmentation
from .steps.step_reward import step_reward
from .trainer import GRPOExtTrainer


__all__ = [
    "DIVERGENCES",
    "ESTIMATORS",
    "JUDGE_FORMATS",
    "Divergence",
    "Estimator",
    "GRPOExtConfig",
    "GRPOExtTrainer",
    "JudgeFormat",
    "JudgeOutcome",
    "JudgeSteps",
    "OutcomeRewardModel",
    "Preset",
    "ProcessRewardModel",
    "RemoteOutcomeRewardModel",
    "RemoteProcessRewardModel",
    "ScoredBatch",
    "Segmentation",
    "StepRewards",
    "TurnRewards",
    "load_reward_model",
    "open_reward_models",
    "rubric_format",
    "step_reward",
]
__version__ = "0.1.0"
