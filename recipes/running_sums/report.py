"""What a run shows and writes: a progress bar, a table, `metrics.json` and `learning_curve.png`."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate import PartialState
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, Trainer

import trl_grpo_ext
from running_sums.policy import Score
from running_sums.training import SumsArguments


PACKAGES = (trl_grpo_ext, trl, transformers, torch)


class ProgressBar(ProgressCallback):
    """A progress bar with the latest accuracy and KL, where transformers' own prints every metric below the bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "kl" in logs:
            accuracy = logs["rewards/judge_answer/mean"]
            self.training_bar.set_description("GRPO")
            self.training_bar.set_postfix(accuracy=f"{accuracy:.2f}", kl=f"{logs['kl']:.4f}")


def use_short_progress_bar(trainer: Trainer) -> None:
    """Replace a trainer's progress bar by [`ProgressBar`]."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)


def training_log(trainer: Trainer) -> list[dict[str, Any]]:
    """What was logged at each GRPO update."""
    return [entry for entry in trainer.state.log_history if "kl" in entry]


def metrics(args: SumsArguments, log: list[dict], before: Score, after: Score) -> dict[str, Any]:
    """Accuracies, and what they depend on: arguments, processes, threads, device, versions."""
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "right_steps_before": before.right_steps,
        "right_steps_after": after.right_steps,
        "kl_after": log[-1]["kl"],
        "arguments": asdict(args),
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "device": str(PartialState().device),
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in PACKAGES},
        },
    }


def plot_learning_curve(path: Path, log: list[dict], before: Score, after: Score, rewards: Mapping[str, str]) -> None:
    """
    Plot accuracy, rewards and exact KL at every GRPO update.

    Args:
        path (`Path`):
            File to write.
        log (`list[dict]`):
            The [`training_log`].
        before, after ([`Score`]):
            Of the held-out problems.
        rewards (`Mapping[str, str]`):
            Logged metrics to show as rewards, with the labels of their curves as keys.
    """
    updates = [entry["step"] for entry in log]
    figure = Figure(figsize=(7, 8), layout="constrained")
    accuracy, reward, kl = figure.subplots(3, 1, sharex=True)
    sampled = [100 * entry["rewards/judge_answer/mean"] for entry in log]
    accuracy.plot(updates, sampled, label="training problems, sampled")
    greedy = [100 * before.accuracy, 100 * after.accuracy]
    accuracy.plot([0, updates[-1]], greedy, "o", clip_on=False, label="held-out problems, greedy")
    accuracy.set(title="Accuracy", ylabel="right answers (%)", ylim=(0, 100))
    for label, metric in rewards.items():
        reward.plot(updates, [entry[metric] for entry in log], label=label)
    reward.set(title="Rewards", ylabel="mean")
    kl.plot(updates, [entry["kl"] for entry in log])
    kl.set(title="Exact KL to the warmed-up policy", ylabel="nats per token", xlabel="GRPO update", ylim=(0, None))
    for axes in (accuracy, reward, kl):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (accuracy, reward):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def print_scores(before: Score, after: Score, num_held_out: int) -> None:
    """Print the scores before and after GRPO as a table."""
    table = Table(title=f"{num_held_out} held-out problems, greedy decoding")
    table.add_column("share of")
    for column in ("warmed up", "after GRPO", "change"):
        table.add_column(column, justify="right")
    for name, old, new in zip(("right answers", "right steps"), before, after, strict=True):
        table.add_row(name, f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f} points")
    Console().print(table)


def write_report(
    args: SumsArguments,
    log: list[dict],
    before: Score,
    after: Score,
    rewards: Mapping[str, str],
    more_metrics: Mapping[str, Any],
) -> None:
    """Write `metrics.json`, to which `more_metrics` are added, and `learning_curve.png`, and print the table."""
    folder = Path(args.output_dir)
    everything = {**metrics(args, log, before, after), **more_metrics}
    (folder / "metrics.json").write_text(json.dumps(everything, indent=2) + "\n")
    plot_learning_curve(folder / "learning_curve.png", log, before, after, rewards)
    print_scores(before, after, args.num_held_out)
    written = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir()))
    print(f"Written to {folder}: {written}")
