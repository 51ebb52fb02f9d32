"""
How large the report of a run is, and how long it takes to make: `python recipes/bench/credit_report.py --help`.

It writes a log of credit of made-up completions with two sources, as training would, and makes its report. Words,
entropies and log-probs are random, which compresses worse than a real run's.
"""

import argparse
import random
import time
from pathlib import Path

import torch

from trl_grpo_ext.advantages.settings import AdvantageSettings
from trl_grpo_ext.credit.decomposition import decompose
from trl_grpo_ext.credit.log import completion_rows, credit_file, write_rows
from trl_grpo_ext.report import main as write_report


GROUP_SIZE = 8
STEP_TOKENS = 24
SETTINGS = {
    "supervision": "process",
    "advantage_estimator": "position",
    "normalizes": "returns",
    "options": {"position_baseline": "all"},
    "gamma_unit": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "advantage_eps": 1e-4,
    "kl_estimator": "exact",
    "kl_direction": "reverse",
    "beta": 0.01,
}
SOURCES = [
    {"name": "judge_steps", "weight": 1.0, "gamma": 0.99, "transform": "none", "gate": "none"},
    {"name": "judge_answer", "weight": 1.0, "gamma": 0.99, "transform": "none", "gate": "none"},
]


def vocabulary(rng: random.Random, size: int = 8000) -> list[str]:
    """Words of the length of a tokenizer's pieces."""
    return [" " + "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(size)]


def group_rows(rng: random.Random, words: list[str], length: int) -> list[dict]:
    """A group's rows, whose advantages are those of the rewards that they hold."""
    ends = list(range(STEP_TOKENS - 1, length, STEP_TOKENS))
    rewards_KNT = torch.full((2, GROUP_SIZE, length), torch.nan, dtype=torch.float64)
    rewards_KNT[0, :, ends] = torch.bernoulli(torch.full((GROUP_SIZE, len(ends)), 0.7)).double()
    rewards_KNT[1, :, -1] = torch.bernoulli(torch.full((GROUP_SIZE,), 0.5)).double()
    mask_NT = torch.ones(GROUP_SIZE, length, dtype=torch.bool)
    settings = AdvantageSettings(estimator="position", gamma=0.99)
    found = decompose(rewards_KNT, mask_NT, torch.ones(2), GROUP_SIZE, settings)
    entropy_NT = torch.rand(GROUP_SIZE, length).square() * 2
    recorded = {}
    for n in range(GROUP_SIZE):
        # A tokenizer's frequent pieces are its first ones
        ids = [int(len(words) ** rng.random()) for _ in range(length)]
        logps = (-entropy_NT[n] * torch.rand(length) * 2).tolist()
        judged = [
            {"is_steps": True, "ends": ends, "returned": rewards_KNT[0, n, ends].tolist()},
            {"is_steps": False, "ends": [length - 1], "returned": rewards_KNT[1, n, -1:].tolist()},
        ]
        recorded[n] = {
            "prompt": " ".join(rng.choices(words, k=40)),
            "token_ids": ids,
            "tokens": [words[id_ % len(words)] for id_ in ids],
            "loss_mask": [True] * length,
            "advantages": found.advantages_NT[n].float().tolist(),
            "trainer_logprobs": logps,
            "old_logprobs": logps,
            "ref_logprobs": logps,
            "inference_logprobs": None,
            "entropy": entropy_NT[n].tolist(),
            "kl": (torch.rand(length) ** 4).tolist(),
            "truncated": False,
            "step_ends": ends,
            "sources": [{**judgement, "transformed": judgement["returned"]} for judgement in judged],
        }
    withheld_NK = torch.zeros(GROUP_SIZE, 2, dtype=torch.bool)
    return completion_rows(recorded, found, rewards_KNT, withheld_NK, SOURCES, GROUP_SIZE)


def main() -> None:
    """Write the log and the report, and print sizes and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Folder to write to.")
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--groups_per_step", type=int, default=2)
    options = parser.parse_args()
    rng = random.Random(0)
    torch.manual_seed(0)
    words = vocabulary(rng)
    groups = options.completions // GROUP_SIZE
    for step in range(1, groups // options.groups_per_step + 1):
        rows = []
        for number in range(options.groups_per_step):
            for row in group_rows(rng, words, options.tokens):
                rows.append({**row, "group": number, "step": step, "mode": "train"})
        write_rows(credit_file(options.folder, "train", step), rows, SETTINGS)
    start = time.perf_counter()
    write_report([str(options.folder)])
    print(f"Made in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
