"""The model card of a trained model: TRL's, and a section on rewards, advantages and KL with the papers to cite."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from ._swapped import swapped
from .advantages.estimators import find_estimator
from .checkpoints.trainer import CheckpointedTrainer
from .config import GRPOExtConfig
from .rewards.gating import NO_GATE


CARD_NAME = "README.md"


class Citation(NamedTuple):
    """
    What was used, and whose it is.

    Args:
        method (`str`):
            What was used.
        bibtex (`str`):
            The entry of the paper or program.
    """

    method: str
    bibtex: str


_MIN = Citation(
    "the advantage estimator `min` (PURE)",
    """@article{cheng2025stop,
  title   = {Stop Summation: Min-Form Credit Assignment Is All Process Reward Model Needs for Reasoning},
  author  = {Jie Cheng and Ruixi Qiao and Lijun Li and Chao Guo and Junle Wang and Gang Xiong and Yisheng Lv and
             Fei-Yue Wang},
  year    = {2025},
  journal = {arXiv preprint arXiv:2504.15275}
}""",
)
_STEP = Citation(
    "the advantage estimator `step` (LightRFT)",
    """@misc{lightrft,
  title        = {LightRFT: Light, Efficient, Omni-modal \\& Reward-model Driven Reinforcement Fine-Tuning Framework},
  author       = {Niu, Yazhe and Pu, Yuan and Shi, Dongxing and Lu, Yudong and Xiong, Yingtong and Ge, Ruijun and
                  Sun, Jiaxuan and Wan, Zunian and Zhang, Shaoang},
  year         = {2025},
  howpublished = {\\url{https://github.com/opendilab/LightRFT}}
}""",
)
_GSPO = Citation(
    "the importance ratio of the sequence (GSPO)",
    """@article{zheng2025gspo,
  title   = {Group Sequence Policy Optimization},
  author  = {Chujie Zheng and Shixuan Liu and Mingze Li and Xiong-Hui Chen and Bowen Yu and Chang Gao and Kai Dang and
             Yuqiong Liu and Rui Men and An Yang and Jingren Zhou and Junyang Lin},
  year    = {2025},
  journal = {arXiv preprint arXiv:2507.18071}
}""",
)
_TRANSFORMS = Citation(
    "the reward transforms `clip` and `delta`",
    """@article{gao2024designing,
  title   = {On Designing Effective RL Reward at Training Time for LLM Reasoning},
  author  = {Jiaxuan Gao and Shusheng Xu and Wenjie Ye and Weilin Liu and Chuyi He and Wei Fu and Zhiyu Mei and
             Guangju Wang and Yi Wu},
  year    = {2024},
  journal = {arXiv preprint arXiv:2410.15115}
}""",
)
_EXACT_KL = [
    Citation(
        "the exact KL, as a part of the KL between sequences",
        """@article{amini2025better,
  title   = {Better Estimation of the KL Divergence Between Language Models},
  author  = {Afra Amini and Tim Vieira and Ryan Cotterell},
  year    = {2025},
  journal = {arXiv preprint arXiv:2504.10637}
}""",
    ),
    Citation(
        "the exact KL, as a term of the loss",
        """@article{tang2025pitfalls,
  title   = {On a few pitfalls in KL divergence gradient estimation for RL},
  author  = {Yunhao Tang and R{\\'e}mi Munos},
  year    = {2025},
  journal = {arXiv preprint arXiv:2506.09477}
}""",
    ),
]
_SAMPLED_KL = Citation(
    "the estimate of the KL",
    """@misc{schulman2020approximating,
  title        = {Approximating KL Divergence},
  author       = {John Schulman},
  year         = {2020},
  howpublished = {\\url{http://joschu.net/blog/kl-approx.html}}
}""",
)
# TRL's card cites DeepSeekMath, of which "pooled" is, as GRPO
_BY_ESTIMATOR = {"min": [_MIN], "step": [_STEP]}


def citations(args: GRPOExtConfig) -> list[Citation]:
    """What a model that was trained with this config should cite beside GRPO and TRL, which TRL's card cites."""
    cited: list[Citation] = []
    if args.supervision == "process":
        cited += _BY_ESTIMATOR.get(args.advantage_estimator, [])
    if any(name.partition(":")[0] in ("clip", "delta") for name in args.reward_transforms or []):
        cited.append(_TRANSFORMS)
    if args.importance_sampling_level.startswith("sequence"):
        cited.append(_GSPO)
    if args.beta:
        cited += _EXACT_KL if args.kl_estimator == "exact" else [_SAMPLED_KL]
    return cited


def training_section(args: GRPOExtConfig, names: Sequence[str], weights: Sequence[str]) -> str:
    """
    The section of a model card on how rewards became advantages, on the KL, and on what to cite.

    Args:
        args ([`GRPOExtConfig`]):
            The config of the run.
        names (`Sequence[str]`):
            Names of the K reward sources.
        weights (`Sequence[str]`):
            Their K weights, numbers or schedules.

    Returns:
        `str`: Markdown that begins with a heading of level 2.
    """
    parts = [
        "## Rewards, advantages and KL",
        "Trained with `trl_grpo_ext`, which extends TRL's GRPO.",
        _table(("setting", "value"), [*_advantage_rows(args), *_kl_rows(args), ("versions", _versions())]),
        _source_table(args, names, weights),
    ]
    for citation in citations(args):
        parts.append(f"Cite for {citation.method}:\n\n```bibtex\n{citation.bibtex}\n```")
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A pipe in a name would end its cell
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _advantage_rows(args: GRPOExtConfig) -> list[tuple[str, str]]:
    combined = f"`{args.multi_objective_aggregation}`, scaled by `{args.scale_rewards}`"
    loss = f"`{args.loss_type}`, importance ratio per `{args.importance_sampling_level}`"
    if args.supervision == "outcome":
        return [
            ("supervision", "`outcome`: one advantage for each completion"),
            ("sources combined", combined),
            ("loss", loss),
        ]
    estimator = find_estimator(args.advantage_estimator)
    options = [f", `{name}={value}`" for name, value in args.estimator_options.items() if name in estimator.options]
    return [
        ("supervision", "`process`: one advantage for each token"),
        ("advantage estimator", f"`{args.advantage_estimator}`: {estimator.description}{''.join(options)}"),
        ("discount", f"the sources' gamma, at each {args.gamma_unit}"),
        ("sources combined", combined),
        ("loss", loss),
    ]


def _kl_rows(args: GRPOExtConfig) -> list[tuple[str, str]]:
    if not args.beta:
        return [("KL", "none (`beta` = 0)")]
    if args.kl_estimator == "exact":
        kind = f"`exact`, {args.kl_direction}, over the whole vocabulary"
    else:
        kind = f"`{args.kl_estimator}`, estimated from the sampled token"
    reference = "the model as it was before training"
    if args.sync_ref_model:
        reference = (
            f"moved towards the policy every {args.ref_model_sync_steps} steps by {args.ref_model_mixup_alpha:g}"
        )
    return [("KL", f"{kind}; `beta` = {args.beta:g}, reduced by `{args.kl_reduction}`"), ("KL reference", reference)]


def _source_table(args: GRPOExtConfig, names: Sequence[str], weights: Sequence[str]) -> str:
    count = len(names)
    gammas = ["none"] * count
    if args.supervision == "process":
        gamma = args.gamma if isinstance(args.gamma, list) else [args.gamma] * count
        gammas = [f"{value:g}" for value in gamma]
    columns = {
        "reward source": [f"`{name}`" for name in names],
        "weight": list(weights),
        "gamma": gammas,
        "transform": args.reward_transforms or ["none"] * count,
        "outcome gate": args.outcome_gate or [NO_GATE] * count,
    }
    return _table(tuple(columns), list(zip(*columns.values(), strict=True)))


def _versions() -> str:
    # Not on top, where the package is not yet whole
    from . import __version__

    found = [f"{package} {version(package)}" for package in ("trl", "transformers", "peft", "accelerate", "torch")]
    return ", ".join([f"trl_grpo_ext {__version__}", *found])


class ModelCardTrainer(CheckpointedTrainer):
    """
    [`~trl.GRPOTrainer`] whose model cards say how rewards became advantages, name the KL, and cite both.

    The card is written with every saved model, where TRL writes one with checkpoints and pushed models only.
    """

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """TRL's card, and the section on rewards, advantages and KL; takes TRL's arguments."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            weights = [f"{weight:g}" for weight in self.reward_weights.tolist()]
            # A schedule as the config has it; an environment's own reward is in no config
            for k, weight in enumerate(cast(list[Any], self.args.reward_weights or [])):
                weights[k] = weight if isinstance(weight, str) else weights[k]
            section = training_section(self.args, self.reward_func_names, weights)
            with (Path(cast(str, self.args.output_dir)) / CARD_NAME).open("a", encoding="utf-8") as card:
                card.write(f"\n\n{section}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model as TRL does, with its card.

        Args:
            output_dir (`str`, *optional*):
                Folder to write to. By default that of the config.
        """
        run_folder = cast(str, self.args.output_dir)
        model_name = Path(run_folder).name if self.args.hub_model_id is None else self.args.hub_model_id.split("/")[-1]
        # PEFT completes a card that it finds, and writes an empty one where there is none
        with swapped(self.args, output_dir=output_dir or run_folder):
            self.create_model_card(model_name)
        super().save_model(output_dir, _internal_call)
