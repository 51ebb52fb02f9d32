"""
k1, k2, k3 and the exact KL on SmolLM2-135M-Instruct: bias and scatter of value and gradient at the same states.

    cd recipes && python -m evidence.kl_estimators --model_name_or_path FOLDER

The reference q is the model as it is. The policy p is the model after a few updates of LoRA on worked solutions. A
state is what the policy has seen and written before a token. At each state the next-token distributions of both models
are known, so mean and variance of an estimate over the sampled token are sums over the vocabulary: nothing is sampled
but the states. Draws of tokens check the sums.

With `d = log p - log q` and tokens drawn from b, a loss that depends on the log-prob of the drawn token v has the
gradient `c(v) (e_v - p)` with respect to the logits, `c` being its derivative. With the ratio `w = p / b`:

    estimate      k                  c without ratio    c with ratio
    k1            d                  1                  w (d + 1)
    k2            d^2 / 2            d                  w d            (ratio held constant)
    k3            exp(-d) + d - 1    1 - exp(-d)        w d
    exact KL      sum_v p d          gradient of the logits: p (d - KL)

Gradients are compared in the last hidden state h, where `dh = dz W` for the rows W of the LM head. All that lies
below, a LoRA adapter for example, has the gradient `sum_t J_t^T dh_t` with the same Jacobians J for every estimate.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from running_sums.task import make_problem, solution_steps, worked_solution
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import TrlParser

from evidence.figures import COLOURS, plus_minus, print_table, save_figure, tidy
from evidence.runs import HERE, VERSIONS, append, is_done, read
from trl_grpo_ext import DIVERGENCES


@dataclass
class KLArguments:
    """The model, how far it is moved, and how many states are visited."""

    model_name_or_path: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "The model."})
    results: str = field(default=str(HERE), metadata={"help": "Folder of CSV file and figure."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Each trains a policy."})
    max_steps: int = field(default=6, metadata={"help": "Updates on worked solutions."})
    batch_size: int = field(default=4, metadata={"help": "Worked solutions per update."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of AdamW, on the LoRA adapter."})
    num_prompts: int = field(default=8, metadata={"help": "Completions that the policy writes."})
    completion_length: int = field(default=32, metadata={"help": "Tokens of each."})
    draws: int = field(default=1000, metadata={"help": "Tokens drawn at each state to check the sums."})


# ---------------------------------------------------------------------------------------------------------------------
# The policy and the states that it visits


def chat(tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    """`3+4-2=` as a conversation that waits for its answer."""
    messages = [{"role": "user", "content": f"What is {problem.rstrip('=')}? Work it out step by step."}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def answer_of(problem: str) -> str:
    """The worked solution, a step for each line."""
    return "\n".join(step.rstrip(";") for step in solution_steps(worked_solution(problem)))


def worked_batch(tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> dict[str, torch.Tensor]:
    """Conversations with worked solutions, the prompt's tokens without a label."""
    prompts = [chat(tokenizer, problem) for problem in problems]
    texts = [prompt + answer_of(problem) for prompt, problem in zip(prompts, problems, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
    return {**batch, "labels": labels}


@dataclass(frozen=True)
class States:
    """Log-probs `(M, V)` at the visited states, and the LM head `(V, H)`."""

    policy: torch.Tensor
    before: torch.Tensor
    reference: torch.Tensor
    head: torch.Tensor

    @cached_property
    def centre(self) -> torch.Tensor:
        """Mean row of the head under the policy, `(M, H)`."""
        return self.policy.exp() @ self.head

    @cached_property
    def squares(self) -> torch.Tensor:
        """Squared length of `dh` for each token that can be drawn, if the slope is 1: `|W_v - centre|^2`, `(M, V)`."""
        lengths = (self.head**2).sum(-1)
        return lengths - 2 * self.centre @ self.head.T + (self.centre**2).sum(-1, keepdim=True)


@torch.no_grad()
def log_probs(model: Any, ids: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs of all tokens at each place of the completions, `(M, V)`, in float64."""
    width = prompts["input_ids"].size(1)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, width:])], 1)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.size(1) - width + 1).logits[:, :-1]
    return logits.flatten(0, 1).double().log_softmax(-1)


def visit_states(args: KLArguments, seed: int) -> States:
    """Train a policy, let it write, and take the distributions of both models, and of the policy an update before."""
    set_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=0.0)
    before = {}
    for _ in range(args.max_steps):
        before = {name: weight.detach().clone() for name, weight in trained.items()}
        problems = [make_problem(rng) for _ in range(args.batch_size)]
        model(**worked_batch(tokenizer, problems)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    texts = [chat(tokenizer, make_problem(rng)) for _ in range(args.num_prompts)]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    length = {"max_new_tokens": args.completion_length, "min_new_tokens": args.completion_length}
    ids = model.generate(**prompts, **length, do_sample=True, top_k=0, top_p=1.0)
    policy = log_probs(model, ids, prompts)
    with model.disable_adapter():
        reference = log_probs(model, ids, prompts)
    for name, weight in trained.items():
        weight.data.copy_(before[name])
    head = base.get_output_embeddings().weight.detach().double()
    return States(policy, log_probs(model, ids, prompts), reference, head)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


class Estimate(NamedTuple):
    """Value and derivative of a loss with respect to the log-prob of the drawn token, from d and the ratio w."""

    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# Of `trl_grpo_ext.kl.estimates`; a test holds these to it
ESTIMATES = {
    ("k1", "no"): Estimate(lambda d, w: d, lambda d, w: torch.ones_like(d)),
    ("k2", "no"): Estimate(lambda d, w: d**2 / 2, lambda d, w: d),
    ("k3", "no"): Estimate(lambda d, w: torch.expm1(-d) + d, lambda d, w: -torch.expm1(-d)),
    ("k1", "yes"): Estimate(lambda d, w: w * d, lambda d, w: w * (d + 1)),
    ("k2", "yes"): Estimate(lambda d, w: w * d**2 / 2, lambda d, w: w * d),
    ("k3", "yes"): Estimate(lambda d, w: w * (torch.expm1(-d) + d), lambda d, w: w * d),
}


class Moments(NamedTuple):
    """Of one estimate at each state `(M,)`: mean and variance of the value; mean `(M, H)` and variance of dh."""

    value_mean: torch.Tensor
    value_variance: torch.Tensor
    gradient_mean: torch.Tensor
    gradient_variance: torch.Tensor


def moments(estimate: Estimate, states: States, sampler: torch.Tensor) -> Moments:
    """Sums over the vocabulary, for tokens drawn from `sampler`, log-probs `(M, V)`."""
    b = sampler.exp()
    log_ratio = states.policy - states.reference
    w = (states.policy - sampler).exp()
    k = estimate.value(log_ratio, w)
    c = estimate.slope(log_ratio, w)
    value_mean = (b * k).sum(-1)
    value_variance = (b * (k - value_mean[:, None]) ** 2).sum(-1)
    gradient_mean = (b * c) @ states.head - (b * c).sum(-1, keepdim=True) * states.centre
    gradient_variance = (b * c**2 * states.squares).sum(-1) - (gradient_mean**2).sum(-1)
    return Moments(value_mean, value_variance, gradient_mean, gradient_variance)


def exact_gradient(states: States) -> torch.Tensor:
    """Gradient of the exact KL in the last hidden states, `(M, H)`."""
    p = states.policy.exp()
    log_ratio = states.policy - states.reference
    kl = (p * log_ratio).sum(-1, keepdim=True)
    return (p * (log_ratio - kl)) @ states.head


def root_mean_square(vectors: torch.Tensor) -> float:
    """Length of vectors `(M, H)`, over states."""
    return (vectors**2).sum(-1).mean().sqrt().item()


def drawn(
    estimate: Estimate, states: States, sampler: torch.Tensor, draws: int, expected: Moments
) -> tuple[float, float]:
    """
    Means over drawn tokens: of the value, over all states; and the distance of the mean gradient from its expectation.

    The distance is in units of what the variance predicts, so that it is 1 if the sums are right.
    """
    tokens = torch.multinomial(sampler.exp(), draws, replacement=True)
    w = (states.policy - sampler).exp()
    log_ratio = states.policy - states.reference
    value = estimate.value(log_ratio, w).gather(1, tokens).mean().item()
    slopes = estimate.slope(log_ratio, w).gather(1, tokens)
    weights = torch.zeros_like(sampler).scatter_add_(1, tokens, slopes / draws)
    mean_gradient = weights @ states.head - weights.sum(-1, keepdim=True) * states.centre
    distance = root_mean_square(mean_gradient - expected.gradient_mean)
    return value, distance / (expected.gradient_variance.mean() / draws).sqrt().item()


def rows_of(states: States, draws: int) -> list[dict[str, Any]]:
    """A row for each estimate, on policy and with tokens of the policy an update before."""
    kl = DIVERGENCES["reverse"].dense(states.policy, states.reference)
    target = exact_gradient(states)
    size = root_mean_square(target)
    rows = []
    for sampling, sampler in {"on policy": states.policy, "an update before": states.before}.items():
        for (name, ratio), estimate in ESTIMATES.items():
            found = moments(estimate, states, sampler)
            value, distance = drawn(estimate, states, sampler, draws, found)
            rows.append(
                {
                    "sampled": sampling,
                    "estimate": name,
                    "ratio": ratio,
                    "states": len(kl),
                    "kl": kl.mean().item(),
                    "value_bias": ((found.value_mean - kl).mean() / kl.mean()).item(),
                    "value_scatter": (found.value_variance.mean().sqrt() / kl.mean()).item(),
                    "gradient_bias": root_mean_square(found.gradient_mean - target) / size,
                    "gradient_scatter": found.gradient_variance.mean().sqrt().item() / size,
                    "drawn_value_bias": value / kl.mean().item() - 1,
                    "drawn_gradient_distance": distance,
                }
            )
    return rows + [exact_row(states, kl, target, size)]


def exact_row(states: States, kl: torch.Tensor, target: torch.Tensor, size: float) -> dict[str, Any]:
    """The exact KL in float32, as the trainer computes it: what is left is rounding."""
    logits = states.policy.float().requires_grad_()
    values = DIVERGENCES["reverse"].dense(logits.log_softmax(-1), states.reference.float())
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    rounding = root_mean_square(gradient.double() @ states.head - target) / size
    return {
        "sampled": "any",
        "estimate": "exact",
        "ratio": "no",
        "states": len(kl),
        "kl": kl.mean().item(),
        "value_bias": ((values.double() - kl).mean() / kl.mean()).item(),
        "value_scatter": 0.0,
        "gradient_bias": rounding,
        "gradient_scatter": 0.0,
        "drawn_value_bias": 0.0,
        "drawn_gradient_distance": 0.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure


NUMBERS = ("value_bias", "value_scatter", "gradient_bias", "gradient_scatter")


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """The numbers of all seeds, for each estimate."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        own = found.setdefault((row["sampled"], row["estimate"], row["ratio"]), {name: [] for name in NUMBERS})
        for name in NUMBERS:
            own[name].append(float(row[name]))
    return found


def table(rows: list[dict[str, str]]) -> list[list[str]]:
    """Head and lines: percent of the KL, and of the length of its gradient."""
    lines = [["tokens", "estimate", "ratio", *(f"{name.replace('_', ' ')} (%)" for name in NUMBERS)]]
    for key, numbers in groups(rows).items():
        lines.append([*key, *(plus_minus([100 * one for one in values], "z.1f") for values in numbers.values())])
    return lines


def figure(rows: list[dict[str, str]]) -> Figure:
    """Bias and scatter of value and gradient; a bar for each estimate, on policy and an update before."""
    found = groups(rows)
    estimates = list(ESTIMATES)
    result = Figure(figsize=(10, 5.2), layout="constrained")
    for axes, name in zip(result.subplots(2, 2).flat, NUMBERS, strict=True):
        for number, sampling in enumerate(("on policy", "an update before")):
            values = [[100 * one for one in found[sampling, *estimate][name]] for estimate in estimates]
            places = [place + (number - 0.5) * 0.38 for place in range(len(estimates))]
            means = [sum(one) / len(one) for one in values]
            label = f"tokens of the policy{', an update before' if number else ''}"
            axes.bar(places, means, 0.36, color=COLOURS[number], alpha=0.8, label=label, zorder=2)
            for place, one in zip(places, values, strict=True):
                axes.scatter([place] * len(one), one, 7, "black", zorder=3, linewidths=0)
        axes.set_xticks(range(len(estimates)), [f"{k}{' × ratio' if r == 'yes' else ''}" for k, r in estimates])
        axes.tick_params(axis="x", labelsize=8)
        axes.axhline(0, color="#888888", linewidth=0.8)
        what = "KL" if name.startswith("value") else "gradient's length"
        axes.set_ylabel(f"{name.replace('_', ' ')}\n(% of the exact {what})")
        if name.endswith("scatter"):
            axes.set_yscale("log")
        tidy(axes)
    result.legend(*result.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    seeds = len({row["seed"] for row in rows})
    result.supxlabel(f"bars: mean of {seeds} policies; dots: each; the exact KL is 0 in all four panels", fontsize=8)
    return result


def main(args: KLArguments) -> None:
    """A policy for each seed, its rows, the table and the figure."""
    path = Path(args.results) / "kl_estimators.csv"
    for seed in args.seeds:
        if not is_done(path, {"seed": seed}):
            rows = rows_of(visit_states(args, seed), args.draws)
            append(path, [{"seed": seed} | row | VERSIONS for row in rows])
            print(f"{path.stem}, seed {seed}: KL {rows[0]['kl']:.3g} nats per token", flush=True)
    rows = read(path)
    print_table(table(rows))
    save_figure(figure(rows), path.with_suffix(".svg"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*TrlParser(KLArguments).parse_args_and_config())
