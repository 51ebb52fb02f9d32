"""
How much KL buys how much held-out accuracy: several weights of the exact KL in the loss.

    cd recipes && python -m evidence.kl_budget

The KL of the trained policy is exact, in nats per token, at the tokens that the policy writes for held-out problems.
The learning rate is one at which the policy moves far, so that there is something to hold back.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from running_sums.policy import complete
from running_sums.task import TOKENIZER
from transformers import PreTrainedModel
from trl import TrlParser

from evidence.figures import COLOURS, arms_of, by_seed, last_updates, print_arms, save_figure, spread, tidy
from evidence.runs import EvidenceArguments, Row, read, run_arms, shares
from trl_grpo_ext import DIVERGENCES


SHARED = {"supervision": "process", "gamma": 0.8, "learning_rate": 1e-4}
NO_KL = "no KL term"
ARMS: dict[str, dict[str, Any]] = {
    # Without a KL term there is no estimator to choose
    NO_KL: SHARED | {"beta": 0.0, "kl_estimator": "k3"},
    **{f"beta {beta:g}": SHARED | {"beta": beta} for beta in (0.1, 1.0, 10.0)},
}


@torch.no_grad()
def mean_kl(policy: PreTrainedModel, reference: PreTrainedModel, problems: Sequence[str]) -> float:
    """Exact KL to the reference, in nats per token of completions that the policy samples."""
    completions = complete(policy, problems, do_sample=True, top_k=0, top_p=1.0)
    prompts = TOKENIZER(list(problems))["input_ids"]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = TOKENIZER.pad({"input_ids": texts}, return_tensors="pt", padding_side="right")
    log_probs = [model(**batch).logits[:, :-1].log_softmax(-1) for model in (policy, reference)]
    kl = DIVERGENCES["reverse"].dense(*log_probs)
    written = batch["attention_mask"][:, 1:].bool()
    for row, prompt in enumerate(prompts):
        written[row, : len(prompt) - 1] = False
    return kl[written].mean().item()


def shares_and_kl(policy: PreTrainedModel, reference: PreTrainedModel, problems: Sequence[str]) -> Row:
    """Shares of right answers and steps, and the KL on half of the problems."""
    return shares(policy, reference, problems) | {"kl": mean_kl(policy, reference, problems[: len(problems) // 2])}


def figure(rows: list[dict[str, str]]) -> Figure:
    """Held-out accuracy over the KL: a dot for each run, a cross for the mean of each arm."""
    result = Figure(figsize=(8, 4.6), layout="constrained")
    axes = result.subplots()
    for (arm, own), colour in zip(arms_of(last_updates(rows)).items(), COLOURS, strict=False):
        kls = list(by_seed(own, "kl").values())
        accuracies = [100 * value for value in by_seed(own, "accuracy").values()]
        axes.scatter(kls, accuracies, 20, colour, alpha=0.5, linewidths=0)
        axes.errorbar(
            mean(kls), mean(accuracies), spread(accuracies), spread(kls), color=colour, marker="o", label=arm
        )
    start = mean(100 * float(row["accuracy"]) for row in rows if int(row["update"]) == 0)
    axes.axhline(start, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="exact KL to the policy before GRPO (nats per token)", ylabel="right answers (%)")
    tidy(axes)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    seeds = len({row["seed"] for row in rows})
    result.supxlabel(
        f"small marks: {seeds} seeds; large marks: mean ± standard deviation over seeds; dotted: before GRPO",
        fontsize=8,
    )
    return result


def main(args: EvidenceArguments) -> None:
    """The runs, the table and the figure."""
    path = Path(args.results) / "kl_budget.csv"
    run_arms(args, path, ARMS, measure=shares_and_kl)
    rows = read(path)
    print_arms(rows, ["accuracy", "right_steps", "kl"], base=NO_KL)
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(*TrlParser(EvidenceArguments).parse_args_and_config())
