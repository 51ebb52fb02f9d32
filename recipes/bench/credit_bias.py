r"""
Which gradient does each advantage estimator follow? Exact, by enumeration, in float64.

    python recipes/bench/credit_bias.py [--processes NAME ...] [--csv FILE]

A decision process is a small tree. At each token a policy chooses among a few actions, and the path decides the
rewards. So all completions can be listed, with their probabilities and their scores `grad log pi`, and with them all
groups of G completions of one prompt. For each group the package's own `process_advantages` gives the advantages.

Expected update of an estimator:

`u = sum_groups P(group) 1/G sum_i sum_t A_{i,t} grad log pi_{i,t}`

Policy gradient, from returns without any baseline, which are written here anew as a loop over tokens:

`g = sum_completions P sum_t R_t grad log pi_t`

At gamma = 1, g is the gradient of the expected return. What is printed of each estimator:

- share: `<u, g> / <g, g>`. It is 1 where the update is the policy gradient.
- cosine: `<u, g> / (|u| |g|)`. Below 1 the update follows another objective.
- groups: how many groups give the accuracy along g that one group gives with `position` and the baseline `all`, in the
  same process and setting. It is the ratio of `E |u_group - u|^2 / share^2`.

`optimal` is a baseline that the package does not have: the mean of the others' returns at the same token index, each
weighted with the squared norm of its scores so far, `W_{j,t} = sum_{s <= t} |grad log pi_{j,s}|^2`, as in verl's
`optimal_token_baseline`, without the completion itself.

What depends on the whole batch, the scale `batch` and the order `normalize_then_sum`, is enumerated for batches of two
groups of two.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_grpo_ext.advantages.combine import process_advantages
from trl_grpo_ext.advantages.settings import AdvantageSettings


# ---------------------------------------------------------------------------------------------------------------------
# Decision processes


class Token(NamedTuple):
    """
    One token of a completion.

    Args:
        rewards (`tuple` of `float` or `None`):
            Of each source, on this token; `None` where there is none.
        choice (`tuple[str, int]`, *optional*):
            The choice that the token is: the name of the policy's logits, and the action. By default there was none.
        in_loss (`bool`, *optional*, defaults to `True`):
            Whether the policy wrote the token.
    """

    rewards: tuple[float | None, ...]
    choice: tuple[str, int] | None = None
    in_loss: bool = True


class Completion(NamedTuple):
    """
    A path through the tree.

    Args:
        tokens (`list[Token]`):
            What is written.
        chance (`float`, *optional*, defaults to 1.0):
            The factor of its probability that the policy has no part in.
    """

    tokens: list[Token]
    chance: float = 1.0


class Process(NamedTuple):
    """
    All completions of a prompt.

    Args:
        completions (`list[Completion]`):
            Their probabilities add up to 1.
        logits (`dict[str, list[float]]`):
            The policy's, by name; two equal ones where nothing is said.
        weights (`list[float]`):
            Of the reward sources.
        gammas (`list[float]`, *optional*):
            Of the reward sources, in place of the one that all have.
        group_size (`int`):
            Completions of a group.
    """

    completions: list[Completion]
    logits: dict[str, list[float]] = {}
    weights: list[float] = [1.0]
    gammas: list[float] | None = None
    group_size: int = 4


def lengths(
    rewards: Callable[[int], Sequence[tuple[float | None, ...]]], most: int = 6, one_choice: bool = True
) -> list[Completion]:
    """
    The policy decides after each token whether to go on.

    Args:
        rewards (`Callable[[int], Sequence[tuple[float | None, ...]]]`):
            Maps the length of a completion to the rewards of each of its tokens.
        most (`int`, *optional*, defaults to 6):
            The length at which there is no choice.
        one_choice (`bool`, *optional*, defaults to `True`):
            Whether the policy has the same logits at each length.
    """
    completions = []
    for length in range(1, most + 1):
        tokens = []
        for t, given in enumerate(rewards(length)):
            name = "go on" if one_choice else f"go on after {t}"
            choice = (name, int(t + 1 < length)) if t + 1 < most else None
            tokens.append(Token(given, choice))
        completions.append(Completion(tokens))
    return completions


def words(rewards: Callable[..., Sequence[tuple[float | None, ...]]], length: int = 3) -> list[Completion]:
    """
    At each of a fixed number of tokens the policy chooses between 0 and 1.

    Args:
        rewards (`Callable[..., Sequence[tuple[float | None, ...]]]`):
            Maps the chosen actions to the rewards of each token.
        length (`int`, *optional*, defaults to 3):
            Number of tokens.
    """
    return [
        Completion(
            [Token(given, (f"token {t}", bit)) for t, (bit, given) in enumerate(zip(bits, rewards(bits), strict=True))]
        )
        for bits in itertools.product((0, 1), repeat=length)
    ]


def last_only(length: int, reward: float | None) -> list[tuple[float | None]]:
    return [(None,)] * (length - 1) + [(reward,)]


def steps_and_bonus(step: float, bonus: float) -> Callable[[int], list[tuple[float]]]:
    """A reward for each token, and a bonus at the end of 4 or more."""
    return lambda length: [(step + bonus * (length >= 4 and t + 1 == length),) for t in range(length)]


def only_bonus(length: int) -> list[tuple[float | None]]:
    return last_only(length, float(length >= 4))


def after_a_tool(bits: tuple[int, ...]) -> list[Token]:
    """A call, three tokens of its result, and an answer, which is right if it is what the call was."""
    call, answer = bits
    return [
        Token((0.2 * call,), ("call", call)),
        *[Token((None,), in_loss=False)] * 3,
        Token((float(call == answer),), (f"answer to {call}", answer)),
    ]


def step_of_two(t: int, bit: int) -> list[Token]:
    """A choice, and the token that ends its step and carries the reward."""
    return [Token((None,), (f"step {t}", bit)), Token((bit - 0.5,))]


def with_failures(completions: list[Completion], share: float) -> list[Completion]:
    """The judge fails, by a chance that nothing has a part in."""
    kept = [Completion(tokens, 1 - share) for tokens, _ in completions]
    lost = [Completion([token._replace(rewards=(None,)) for token in tokens], share) for tokens, _ in completions]
    return kept + lost


def short_or_long() -> list[Completion]:
    """One token with a sure reward, or three on which each good one is paid."""
    long = [
        Completion(
            [Token((0.0,), ("long", 1)), *(Token((0.6 * bit,), (f"token {t}", bit)) for t, bit in enumerate(bits))]
        )
        for bits in itertools.product((0, 1), repeat=2)
    ]
    return [Completion([Token((0.5,), ("long", 0))]), *long]


PROCESSES = {
    "every step +0.5": Process(lengths(steps_and_bonus(0.5, 0)), group_size=8),
    "every step +0.5, and +1 if 4 or more": Process(lengths(steps_and_bonus(0.5, 1)), group_size=8),
    "only +1 if 4 or more": Process(lengths(steps_and_bonus(0.0, 1)), group_size=8),
    "every step -0.2, and +1 if 4 or more": Process(lengths(steps_and_bonus(-0.2, 1)), group_size=8),
    "every step +0.5, a choice for each length": Process(lengths(steps_and_bonus(0.5, 0), one_choice=False)),
    "every step -0.2, and +1 if 4 or more, a choice for each length": Process(
        lengths(steps_and_bonus(-0.2, 1), one_choice=False)
    ),
    "every step -0.2, long completions likely": Process(lengths(steps_and_bonus(-0.2, 0)), {"go on": [0.0, 1.5]}),
    "+1 at the end if 4 or more": Process(lengths(only_bonus)),
    "brevity: +1 at the end, -0.1 a token": Process(lengths(lambda n: last_only(n, 1 - 0.1 * n))),
    "one token, three arms": Process(
        [Completion([Token((reward,), ("arm", arm))]) for arm, reward in enumerate((0.0, 0.3, 1.0))],
        {"arm": [0.5, 0.0, -0.5]},
    ),
    "three tokens, each paid": Process(words(lambda bits: [(float(bit),) for bit in bits])),
    "three tokens, the first paid by the last": Process(
        words(lambda bits: [(float(bits[0] == bits[2]),), (0.3 * bits[1],), (0.0,)])
    ),
    "three tokens, +1 if all are right": Process(words(lambda bits: last_only(3, float(all(bits))))),
    "three tokens, rarely all right": Process(
        words(lambda bits: last_only(3, float(all(bits)))), {f"token {t}": [1.5, 0.0] for t in range(3)}
    ),
    "steps of two tokens": Process(
        [
            Completion([token for bit, t in zip(bits, (0, 1), strict=True) for token in step_of_two(t, bit)])
            for bits in itertools.product((0, 1), repeat=2)
        ]
    ),
    "steps that are not scored": Process(
        words(lambda bits: [(1.0 if bits[0] else None,), (None,), (float(bits[2]),)])
    ),
    "short and sure, or long": Process(short_or_long()),
    "a tool's result between": Process(
        [Completion(after_a_tool(bits)) for bits in itertools.product((0, 1), repeat=2)]
    ),
    "a judge that fails at random": Process(with_failures(lengths(only_bonus, most=4), 0.3)),
    "a judge that fails on long completions": Process(lengths(lambda n: last_only(n, 0.5 if n < 4 else None))),
    "no spread": Process(words(lambda bits: [(1.0,)] * 3)),
    "two sources, other gammas": Process(
        words(lambda bits: [(float(bits[0]), None), (float(bits[1]), None), (0.0, float(bits == (1, 0, 1)))]),
        weights=[1.0, 0.5],
        gammas=[0.9, 1.0],
    ),
    "two sources, one ten times as large": Process(
        words(lambda bits: [(float(bits[0]), None), (0.0, None), (0.0, 10.0 * bits[2])]), weights=[1.0, 0.5]
    ),
    "two sources, one of which judges some": Process(
        words(lambda bits: [(float(bits[0]), None), (0.0, None), (0.0, 1.0 * bits[2] if bits[1] else None)]),
        weights=[1.0, 1.0],
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Enumeration


class Listed(NamedTuple):
    """
    The completions of a process as tensors, N completions of at most T tokens, D logits, K sources.

    Args:
        probabilities_N (`torch.Tensor` of shape `(N,)`):
            Of each completion.
        scores_NTD (`torch.Tensor` of shape `(N, T, D)`):
            `grad log pi` of each token.
        rewards_KNT (`torch.Tensor` of shape `(K, N, T)`):
            NaN where there is none.
        mask_NT (`torch.Tensor` of shape `(N, T)`):
            True on loss tokens.
    """

    probabilities_N: torch.Tensor
    scores_NTD: torch.Tensor
    rewards_KNT: torch.Tensor
    mask_NT: torch.Tensor


def listed(process: Process) -> Listed:
    """All completions of a process."""
    num_sources = len(process.weights)
    tokens = [completion.tokens for completion in process.completions]
    names = sorted({token.choice[0] for row in tokens for token in row if token.choice})
    logits = {name: torch.tensor(process.logits.get(name, [0.0, 0.0]), dtype=torch.float64) for name in names}
    columns = dict(zip(names, itertools.accumulate([0, *(len(logits[name]) for name in names)]), strict=False))
    most = max(map(len, tokens))
    scores = torch.zeros(len(tokens), most, sum(map(len, logits.values())), dtype=torch.float64)
    rewards = torch.full((num_sources, len(tokens), most), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(tokens), most, dtype=torch.bool)
    probabilities = torch.tensor([completion.chance for completion in process.completions], dtype=torch.float64)
    for i, row in enumerate(tokens):
        for t, token in enumerate(row):
            mask[i, t] = token.in_loss
            rewards[:, i, t] = torch.tensor(
                [math.nan if reward is None else reward for reward in token.rewards], dtype=torch.float64
            )
            if token.choice:
                name, action = token.choice
                policy = torch.softmax(logits[name], 0)
                probabilities[i] *= policy[action]
                scores[i, t, columns[name] : columns[name] + len(policy)] = -policy
                scores[i, t, columns[name] + action] += 1
    return Listed(probabilities, scores, rewards, mask)


def returns(process: Process, all_: Listed, gamma: float, gamma_unit: str) -> torch.Tensor:
    """`sum_k w_k R^k`, `(N, T)`, by a loop over the loss tokens of each completion."""
    summed = torch.zeros(all_.mask_NT.shape, dtype=torch.float64)
    gammas = process.gammas or [gamma] * len(process.weights)
    for weight, gamma_k, rewards_NT in zip(process.weights, gammas, all_.rewards_KNT, strict=True):
        for i in range(len(rewards_NT)):
            following = 0.0
            after = None
            for t in reversed(all_.mask_NT[i].nonzero()[:, 0].tolist()):
                reward = rewards_NT[i, t].item()
                is_given = not math.isnan(reward)
                discounted = {"token": True, "step": is_given, "turn": t + 1 != after}[gamma_unit]
                following = (reward if is_given else 0.0) + (gamma_k if discounted else 1.0) * following
                summed[i, t] += weight * following
                after = t
    return summed


def policy_gradient(process: Process, all_: Listed, gamma: float, gamma_unit: str) -> torch.Tensor:
    """`sum P sum_t R_t grad log pi_t`, `(D,)`."""
    returns_NT = returns(process, all_, gamma, gamma_unit)
    return torch.einsum("n,nt,ntd->d", all_.probabilities_N, returns_NT, all_.scores_NTD)


def groups(probabilities_N: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All groups regardless of order, `(M, G)` indices, and the probability of each, `(M,)`."""
    members = list(itertools.combinations_with_replacement(range(len(probabilities_N)), group_size))
    index_MG = torch.tensor(members)
    orders = [
        math.factorial(group_size) / math.prod(math.factorial(group.count(i)) for i in set(group)) for group in members
    ]
    return index_MG, torch.tensor(orders, dtype=torch.float64) * probabilities_N[index_MG].prod(1)


class Setting(NamedTuple):
    """
    An estimator and what it is run with.

    Args:
        estimator (`str`):
            A key of `ESTIMATORS`.
        baseline (`str`):
            A value of `position_baseline`, or `""` for estimators that have none.
        scale (`str`):
            `"none"`, `"group"` or `"batch"`.
        aggregation (`str`):
            `"sum_then_normalize"` or `"normalize_then_sum"`.
        gamma (`float`):
            Discount.
        gamma_unit (`str`):
            `"token"`, `"step"` or, where tools answer, `"turn"`.
    """

    estimator: str
    baseline: str
    scale: str
    aggregation: str
    gamma: float
    gamma_unit: str

    @property
    def is_of_batch(self) -> bool:
        """Whether a group's advantages depend on the other groups."""
        return self.scale == "batch" or self.aggregation == "normalize_then_sum"


METHODS = [
    *(("position", baseline) for baseline in ("all", "active", "leave_one_out", "optimal")),
    *((estimator, "") for estimator in ("pooled", "step", "min")),
]
NORMALISATIONS = [
    *((scale, "sum_then_normalize") for scale in ("none", "group", "batch")),
    ("group", "normalize_then_sum"),
]
DISCOUNTS = [(1.0, "token"), (0.9, "token"), (0.9, "step"), (0.9, "turn")]


def settings_of(process: Process) -> list[Setting]:
    """What a process is certified with."""
    every = [Setting(*method, *how, *gamma) for gamma in DISCOUNTS for how in NORMALISATIONS for method in METHODS]
    return [setting for setting in every if _is_possible(process, setting)]


def _is_possible(process: Process, setting: Setting) -> bool:
    if setting.baseline == "optimal" and setting.scale != "none":
        return False
    if setting.gamma_unit == "turn" and all(token.in_loss for row, _ in process.completions for token in row):
        return False
    # The sum of step rewards has one gamma
    sums_steps = setting.estimator in ("pooled", "step") and setting.aggregation == "sum_then_normalize"
    return not (process.gammas and (sums_steps or setting.gamma != 1))


def optimal_advantages(process: Process, all_: Listed, setting: Setting, index_MG: torch.Tensor) -> torch.Tensor:
    """Returns minus the others' mean return, weighted by their scores' squared norms so far, `(M, G, T)`."""
    returns_MGT = returns(process, all_, setting.gamma, setting.gamma_unit)[index_MG]
    weights_MGT = (all_.scores_NTD**2).sum(-1).cumsum(-1)[index_MG]
    sums_MGT = (weights_MGT * returns_MGT).sum(1, keepdim=True) - weights_MGT * returns_MGT
    others_MGT = weights_MGT.sum(1, keepdim=True) - weights_MGT
    baseline_MGT = torch.where(others_MGT > 1e-12, sums_MGT / others_MGT.clamp(min=1e-12), 0.0)
    return (returns_MGT - baseline_MGT) * all_.mask_NT[index_MG]


def group_updates(process: Process, all_: Listed, setting: Setting, index_MG: torch.Tensor) -> torch.Tensor:
    """`1/G sum_i sum_t A_{i,t} grad log pi_{i,t}` of each group, `(M, D)`, all groups being one batch."""
    compute = optimal_advantages if setting.baseline == "optimal" else package_advantages
    advantages_MGT = compute(process, all_, setting, index_MG)
    return torch.einsum("mgt,mgtd->md", advantages_MGT, all_.scores_NTD[index_MG]) / index_MG.size(1)


def package_advantages(process: Process, all_: Listed, setting: Setting, index_MG: torch.Tensor) -> torch.Tensor:
    """Those of the package, `(M, G, T)`."""
    rows = index_MG.flatten()
    advantages_NT = process_advantages(
        all_.rewards_KNT[:, rows],
        all_.mask_NT[rows],
        torch.tensor(process.weights, dtype=torch.float64),
        index_MG.size(1),
        AdvantageSettings(
            estimator=setting.estimator,
            gamma=process.gammas or setting.gamma,
            gamma_unit=setting.gamma_unit,
            options={"position_baseline": setting.baseline} if setting.baseline else {},
            scale=setting.scale,
            aggregation=setting.aggregation,
        ),
    )
    return advantages_NT.view(*index_MG.shape, -1)


class Certificate(NamedTuple):
    """
    What an estimator's update is in expectation.

    Args:
        share (`float`):
            Of the policy gradient; NaN if that is 0.
        cosine (`float`):
            To the policy gradient; NaN if either is 0.
        size (`float`):
            `|u|`.
        variance (`float`):
            `E |u_group - u|^2`.
    """

    share: float
    cosine: float
    size: float
    variance: float

    @property
    def noise(self) -> float:
        """`variance / share^2`; NaN without a share above 0."""
        return self.variance / self.share**2 if self.share > 1e-9 else math.nan


def certify(process: Process, setting: Setting) -> Certificate:
    """Compare an estimator's expected update with the policy gradient."""
    all_ = listed(process)
    gradient_D = policy_gradient(process, all_, setting.gamma, setting.gamma_unit)
    if setting.is_of_batch:
        index_MG, weights_M = groups(all_.probabilities_N, 2)
        pairs = list(itertools.combinations_with_replacement(range(len(index_MG)), 2))
        updates_MD = torch.stack(
            [group_updates(process, all_, setting, index_MG[list(pair)]).mean(0) for pair in pairs]
        )
        weights_M = torch.stack([weights_M[a] * weights_M[b] * (1 if a == b else 2) for a, b in pairs])
    else:
        index_MG, weights_M = groups(all_.probabilities_N, process.group_size)
        updates_MD = group_updates(process, all_, setting, index_MG)
    update_D = weights_M @ updates_MD
    variance = weights_M @ ((updates_MD - update_D) ** 2).sum(1)
    product = float(update_D @ gradient_D)
    return Certificate(
        share=product / float(gradient_D @ gradient_D) if gradient_D.norm() > 1e-12 else math.nan,
        cosine=product / float(update_D.norm() * gradient_D.norm())
        if min(update_D.norm(), gradient_D.norm()) > 1e-12
        else math.nan,
        size=float(update_D.norm()),
        variance=float(variance),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """A process's certificates, each with how many groups it needs beside `position` with the baseline `all`."""
    process = PROCESSES[name]
    rows = []
    base = Certificate(*[math.nan] * 4)
    for setting in settings_of(process):
        certificate = certify(process, setting)
        if (setting.estimator, setting.baseline) == METHODS[0]:
            base = certificate
        rows.append(
            {
                "process": name,
                **setting._asdict(),
                "gamma": " ".join(map(str, process.gammas or [setting.gamma])),
                "group_size": 2 if setting.is_of_batch else process.group_size,
                "share": certificate.share,
                "cosine": certificate.cosine,
                "size": certificate.size,
                "groups": certificate.noise / base.noise if base.noise > 0 else math.nan,
            }
        )
    return rows


def written(value: Any) -> str:
    # Without the last digits, which rounding makes
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> Table:
    """The shares of undiscounted, undivided updates, a row for each process."""
    shown = Table("process", *(f"{estimator} {baseline}".strip() for estimator, baseline in METHODS))
    for name in dict.fromkeys(row["process"] for row in rows):
        shares = {
            (row["estimator"], row["baseline"]): row["share"]
            for row in rows
            if row["process"] == name
            and (row["scale"], row["gamma_unit"]) == ("none", "token")
            and row["gamma"] != "0.9"
        }
        shown.add_row(name, *(f"{shares[method]:.3f}" if method in shares else "" for method in METHODS))
    return shown


def main() -> None:
    options = argparse.ArgumentParser(description="Which gradient each advantage estimator follows.")
    options.add_argument("--processes", nargs="+", choices=list(PROCESSES), default=list(PROCESSES))
    options.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = options.parse_args()
    rows = [row for name in track(arguments.processes, "processes") for row in rows_of(name)]
    Console().print(table(rows))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: written(value) for name, value in row.items()} for row in rows)


if __name__ == "__main__":
    main()
