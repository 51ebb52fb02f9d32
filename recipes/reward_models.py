"""
Reward models of your own: a PRM, an ORM and a rule, weighted, train a small policy. Offline, on a CPU, in minutes.

    accelerate launch recipes/reward_models.py

The task and the policy are those of `quickstart.py`, but nothing that knows the sums is in the reward:

1. A process reward model (PRM), a token classifier, learns to tell right steps from wrong ones, on worked solutions
   with the mistakes that policies make. Its tokenizer is its own: whole numbers, where the policy writes digits.
2. An outcome reward model (ORM), a sequence classifier, learns the same of whole solutions.
3. Both are saved as they would lie on the Hub and loaded by [`ProcessRewardModel`] and [`OutcomeRewardModel`], each
   with a `Preset`, which says in plain data how the model is fed and read. This is the part to copy for your own.
4. GRPO under process supervision, on three sources: the PRM's probabilities, centred so that a wrong step costs what a
   right one earns, and discounted; the ORM's probability; and a rule that asks for one step per term of the problem.

The exact judges are in the run too, with weight 0: they only measure whether the policy games what it is trained on.

Expect, on 2 CPU cores, about 6 minutes and the accuracy on held-out problems to rise by 30 points (measured with seeds
0, 1, 2: 52 % -> 86 %, 41 % -> 71 %, 51 % -> 85 %; rounding differs between machines, and another run of seed 0 reached
97 %). Of the steps that the warmed-up policy writes, right and wrong ones weighing the same, the PRM judges 96 to 98 %
right; of its solutions, the ORM 63 to 78 %. Without the PRM, `--sources orm rule`, the policy finds what the ORM gets
wrong: 52 % -> 11 %.

Two lessons. The PRM learned to add up, not to look the terms up: of wrong terms in a right sum it notices one in ten,
which is what the rule is for. And a PRM that was wrong about a tenth of the wrong sums, `8-2=0` among them, had the
policy write just those: 41 % -> 34 %, while its rewards rose. Watch `rewards/judge_steps/step_mean` beside the PRM's.

Written to `output_dir`: `metrics.json`, `learning_curve.png`, the reward models in `prm/` and `orm/`, the policy in
`warmed_up/` and `policy/`.
"""

import json
import random
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from quickstart import (
    EOS,
    LARGEST_VALUE,
    MAX_COMPLETION_LENGTH,
    NUM_OPERATIONS,
    STEP_END,
    TOKENIZER,
    QuickstartArguments,
    Score,
    evaluate,
    judge_answer,
    judge_steps,
    make_trainer,
    print_table,
    split_problems,
    terms_of,
    training_settings,
    warm_up,
    worked_solution,
)
from rich.console import Console
from rich.table import Table
from sums_with_mistakes import EQUATION, MISTAKES, exact_steps, is_right, solution_with_mistakes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import TrlParser

from trl_grpo_ext import GRPOExtConfig, OutcomeRewardModel, ProcessRewardModel
from trl_grpo_ext.reward_models.presets import Preset
from trl_grpo_ext.steps.segmentation import split_text


@dataclass
class RewardModelArguments(QuickstartArguments):
    """The quickstart's, which sources to train on, and how long to train the reward models."""

    output_dir: str = field(default="outputs/reward_models", metadata={"help": "Folder for all results."})
    sources: list[str] = field(
        default_factory=lambda: list(SOURCES),
        metadata={"help": "Reward sources to train on.", "choices": ["prm", "orm", "rule"]},
    )
    prm_steps: int = field(default=600, metadata={"help": "Updates of the process reward model."})
    orm_steps: int = field(default=300, metadata={"help": "Updates of the outcome reward model."})


# How each reward model is fed and read
PRM_PRESET = Preset.from_dict(
    {
        "name": "running-sum-prm",
        "kind": "process",
        "rendering": {"type": "Tagged", "tag": "<step>"},
        "reading": {"type": "LabelSoftmax", "indices": [1]},
        "head": {"type": "LinearHead", "name": "score", "outputs": 2},
        "segmentation": {"by": f"regex:{STEP_END}"},
    }
)
ORM_PRESET = Preset.from_dict(
    {
        "name": "running-sum-orm",
        "kind": "outcome",
        "rendering": {"type": "Tagged", "tag": "<end>"},
        "reading": {"type": "ValueHead"},
        "head": {"type": "LinearHead", "name": "score", "outputs": 1, "bias": False},
    }
)


class Source(NamedTuple):
    weight: float
    gamma: float
    transform: str


SOURCES = {
    # Plain probabilities would pay for more steps
    "prm": Source(weight=1.0, gamma=0.8, transform="center"),
    "orm": Source(weight=0.5, gamma=1.0, transform="none"),
    "rule": Source(weight=1.0, gamma=1.0, transform="none"),
}
# The exact judges: logged, not trained on
WATCHED = {judge_steps: Source(0.0, 1.0, "center"), judge_answer: Source(0.0, 1.0, "none")}

# Per step; about half of the steps, and of the answers, are then right
PRM_MISTAKE_RATE = 0.5
ORM_MISTAKE_RATE = 0.15
BATCH = 64
IGNORED = -100


# ---------------------------------------------------------------------------------------------------------------------
# The reward models


def build_reward_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as large models have it, with whole numbers up to 28."""
    core = Tokenizer(models.BPE())
    numbers = pre_tokenizers.Split(Regex(r"\d+|\D"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([numbers, byte_level])
    core.decoder = decoders.ByteLevel()
    tags = ["<step>", "<end>"]
    trainer = trainers.BpeTrainer(
        initial_alphabet=byte_level.alphabet(), special_tokens=["<pad>", *tags], show_progress=False
    )
    core.train_from_iterator(2 * [str(number) for number in range(LARGEST_VALUE + 10)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", extra_special_tokens=tags)


def split_solution(solution: str) -> list[str]:
    return [solution[start:end] for start, end in split_text(solution, PRM_PRESET.segmentation.by)]


def label_steps(tokenizer: PreTrainedTokenizerFast, problem: str, solution: str) -> dict:
    """
    A solution as the PRM reads it. A step's tag has label 1 if the step is right, else 0.

    The numbers of a step have labels too: whether it starts from the value stated before, takes the next term, and
    adds up. Scores are read at the tags alone, but told these apart, the model learns the tags several times faster.
    """
    steps = split_solution(solution)
    ids, start, tags = PRM_PRESET.rendering.render(tokenizer, problem, steps)
    labels = [IGNORED] * len(ids)
    for tag, step, exact in zip(tags, steps, exact_steps(problem, steps), strict=True):
        labels[tag] = int(step == exact)
        written, wanted = EQUATION.fullmatch(step), EQUATION.fullmatch(exact)
        # Six tokens, `3`, `+`, `4`, `=`, `7`, `;`, unless a number is too large to be one
        if written and wanted and tag - start == 6:
            labels[start] = int(written[1] == wanted[1])
            labels[start + 2] = int(written[2] == wanted[2])
            labels[start + 4] = int(int(written[1]) + int(written[2]) == int(written[3]))
        start = tag + 1
    return {"input_ids": ids, "labels": labels}


def label_solution(tokenizer: PreTrainedTokenizerFast, problem: str, solution: str) -> dict:
    """A solution as the ORM reads it, with label 1 if its answer is right, else 0."""
    rendered = ORM_PRESET.rendering.render(tokenizer, problem, [solution])
    return {"input_ids": rendered.ids, "labels": [float(is_right(problem, solution))]}


def fit(model: PreTrainedModel, collator, examples: list[dict], folder: Path, **settings) -> PreTrainedModel:
    """Train a classifier, and save it with its tokenizer as it would lie on the Hub."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // PartialState().num_processes,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        **settings,
    )
    dataset = Dataset.from_list(examples)
    trainer = Trainer(model, args, collator, train_dataset=dataset, processing_class=collator.tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    return model


def reward_config(tokenizer: PreTrainedTokenizerFast, layers: int, **settings) -> Qwen3Config:
    """
    A transformer of 0.2 million parameters, shaped so that it learns within a minute on a CPU.

    Not Qwen2: for that, transformers replaces whatever tokenizer lies in the folder by Qwen2's own when it is loaded.
    """
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        # The first layers see a sum and no more, `3+4=7`; to find its terms in all of the text takes long to learn
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * (layers - 2),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # The default, made for large models, starts this one too close to 0
        initializer_range=0.1,
        classifier_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def train_prm(args: RewardModelArguments, problems: list[str], folder: Path) -> PreTrainedModel:
    tokenizer, rng = build_reward_tokenizer(), random.Random(args.seed)
    chosen = rng.choices(problems, k=args.prm_steps * BATCH)
    solutions = [solution_with_mistakes(problem, rng, PRM_MISTAKE_RATE) for problem in chosen]
    examples = [label_steps(tokenizer, *pair) for pair in zip(chosen, solutions, strict=True)]
    model = Qwen3ForTokenClassification(reward_config(tokenizer, layers=3, num_labels=2))
    collator = DataCollatorForTokenClassification(tokenizer)
    return fit(model, collator, examples, folder, max_steps=args.prm_steps, learning_rate=3e-3, seed=args.seed)


def train_orm(args: RewardModelArguments, problems: list[str], prm: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Starts from the PRM, which can judge steps already; one more layer brings their verdicts together."""
    tokenizer, rng = build_reward_tokenizer(), random.Random(args.seed + 1)
    chosen = rng.choices(problems, k=args.orm_steps * BATCH)
    solutions = [solution_with_mistakes(problem, rng, ORM_MISTAKE_RATE) for problem in chosen]
    examples = [label_solution(tokenizer, *pair) for pair in zip(chosen, solutions, strict=True)]
    # With this type the loss of the single label is a binary cross-entropy
    config = reward_config(tokenizer, layers=4, num_labels=1, problem_type="multi_label_classification")
    model = Qwen3ForSequenceClassification(config)
    model.model.load_state_dict(prm.model.state_dict(), strict=False)
    collator = DataCollatorWithPadding(tokenizer)
    return fit(model, collator, examples, folder, max_steps=args.orm_steps, learning_rate=1e-3, seed=args.seed)


class Verdict(NamedTuple):
    """How well scores tell right from wrong: chance is 0.5 for both numbers, however many of each there are."""

    balanced_accuracy: float
    auc: float
    right_share: float
    mean_score: float


def compare(scores: list[float], right: list[bool]) -> Verdict:
    values, is_right = torch.tensor(scores), torch.tensor(right)
    good, bad = values[is_right], values[~is_right]
    accuracy = ((good > 0.5).float().mean() + (bad <= 0.5).float().mean()) / 2
    auc = (good[:, None] > bad).float().mean() + (good[:, None] == bad).float().mean() / 2
    return Verdict(accuracy.item(), auc.item(), is_right.float().mean().item(), values.mean().item())


def judge_prm(prm: ProcessRewardModel, problems: list[str], solutions: list[str]) -> Verdict:
    """The PRM's scores against exact arithmetic, over all steps of these solutions."""
    steps = [prm.split(solution) for solution in solutions]
    exact = [exact_steps(problem, own) for problem, own in zip(problems, steps, strict=True)]
    scores = prm.score_steps(problems, steps)
    right = [
        step == want for own, wants in zip(steps, exact, strict=True) for step, want in zip(own, wants, strict=True)
    ]
    return compare([score for own in scores for score in own], right)


def caught_mistakes(prm: ProcessRewardModel, problems: list[str], rng: random.Random) -> dict[str, float]:
    """Of each kind of mistake, made after right steps, the share to which the PRM gives less than 0.5."""
    caught = {}
    for mistake in MISTAKES:
        solutions = []
        for problem in problems:
            steps = split_solution(worked_solution(problem))[: rng.randint(1, NUM_OPERATIONS)]
            value, term, _ = EQUATION.fullmatch(steps.pop()).groups()
            solutions.append([*steps, mistake(value, term, rng)])
        scores = prm.score_steps(problems, solutions)
        caught[mistake.__name__] = fmean(own[-1] < 0.5 for own in scores)
    return caught


def judge_orm(orm: OutcomeRewardModel, problems: list[str], solutions: list[str]) -> Verdict:
    """The ORM's scores against the exact answers."""
    return compare(orm.score_batch(problems, solutions), list(map(is_right, problems, solutions)))


@torch.no_grad()
def sample_solutions(policy: PreTrainedModel, problems: list[str]) -> list[str]:
    """What the policy writes, sampled as in GRPO."""
    batch = TOKENIZER(problems, return_tensors="pt", padding=True).to(policy.device)
    output = policy.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        max_new_tokens=MAX_COMPLETION_LENGTH,
    )
    texts = TOKENIZER.batch_decode(output[:, batch.input_ids.shape[1] :])
    return [text.partition(EOS)[0] for text in texts]


# ---------------------------------------------------------------------------------------------------------------------
# GRPO


def rule(prompts: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
    """1 if the completion is a step for each of the problem's terms and an answer, and has ended; adds nothing up."""
    forms = ["".join(rf"\d+{re.escape(term)}=\d+{STEP_END}" for term in terms_of(problem)[1:]) for problem in prompts]
    texts = TOKENIZER.batch_decode(completion_ids)
    return [float(bool(re.fullmatch(rf"{form}#\d+{EOS}", text))) for form, text in zip(forms, texts, strict=True)]


def grpo_config(args: RewardModelArguments, sources: list[Source]) -> GRPOExtConfig:
    return GRPOExtConfig(
        supervision="process",
        reward_weights=[source.weight for source in sources],
        gamma=[source.gamma for source in sources],
        reward_transforms=[source.transform for source in sources],
        reward_batch_tokens=8192,
        kl_estimator="exact",
        beta=0.01,
        **training_settings(args),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The report


def print_verdicts(verdicts: dict[str, Verdict]) -> None:
    table = Table(title="Reward models against exact arithmetic")
    for column in ("", "balanced accuracy", "AUC", "truly right", "mean score"):
        table.add_column(column, justify="right" if column else "left")
    for name, verdict in verdicts.items():
        table.add_row(name, *(f"{value:.1%}" for value in verdict))
    Console().print(table)


def plot_learning_curve(path: Path, log: list[dict], sources: list[str], before: Score, after: Score) -> None:
    """True accuracy, what the sources think, and the exact KL at every GRPO update."""
    updates = [entry["step"] for entry in log]
    figure = Figure(figsize=(7, 8), layout="constrained")
    accuracy, rewards, kl = figure.subplots(3, 1, sharex=True)
    accuracy.plot(updates, [entry["rewards/judge_answer/mean"] for entry in log], label="training, sampled")
    accuracy.plot([0, updates[-1]], [before.accuracy, after.accuracy], "o", clip_on=False, label="held out, greedy")
    accuracy.set(title="Right answers", ylabel="share", ylim=(0, 1))
    for name in sources:
        key = "step_mean" if name == "prm" else "mean"
        rewards.plot(updates, [entry[f"rewards/{name}/{key}"] for entry in log], label=name)
    exact = [entry["rewards/judge_steps/step_mean"] for entry in log]
    rewards.plot(updates, exact, "k:", label="steps, judged exactly")
    rewards.set(title="Rewards (of steps, centred: the mean over steps)", ylabel="mean")
    kl.plot(updates, [entry["kl"] for entry in log])
    kl.set(title="Exact KL to the warmed-up policy", ylabel="nats per token", xlabel="GRPO update", ylim=(0, None))
    for axes in (accuracy, rewards, kl):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (accuracy, rewards):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def reward_means(log: list[dict]) -> dict[str, float]:
    """Of each source: its mean, its mean per step, and its steps per completion."""
    names = [
        name for name in log[0] if name.startswith("rewards/") and name.endswith(("/mean", "/step_mean", "/steps"))
    ]
    return {name: fmean(entry[name] for entry in log) for name in names}


def report(
    args: RewardModelArguments,
    log: list[dict],
    before: Score,
    after: Score,
    verdicts: dict[str, Verdict],
    caught: dict[str, float],
    seconds: dict[str, float],
) -> None:
    metrics = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "right_steps_before": before.right_steps,
        "right_steps_after": after.right_steps,
        "reward_models": {name: verdict._asdict() for name, verdict in verdicts.items()},
        "caught_mistakes": caught,
        "first_updates": reward_means(log[:10]),
        "last_updates": reward_means(log[-10:]),
        "kl_after": log[-1]["kl"],
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "arguments": asdict(args),
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
    }
    folder = Path(args.output_dir)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_learning_curve(folder / "learning_curve.png", log, args.sources, before, after)
    print_verdicts(verdicts)
    print_table(before, after, args.num_held_out)
    parts = ", ".join(f"{part} {value:.0f}" for part, value in seconds.items())
    print(f"Seconds: {parts}. In {folder}: metrics.json, learning_curve.png, prm/, orm/, warmed_up/, policy/")


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def main(args: RewardModelArguments) -> None:
    # As in the quickstart
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    transformers.logging.disable_progress_bar()
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_seed(args.seed)
    folder, seconds, verdicts = Path(args.output_dir), {}, {}
    problems = split_problems(args)
    if state.is_main_process:
        with timed(seconds, "warm-up"):
            policy = warm_up(args, problems.warm_up, problems.validation)
        policy.save_pretrained(folder / "warmed_up")
        TOKENIZER.save_pretrained(folder / "warmed_up")
    state.wait_for_everyone()
    policy = LlamaForCausalLM.from_pretrained(folder / "warmed_up").to(state.device)
    with timed(seconds, "PRM"):
        model = train_prm(args, problems.warm_up, folder / "prm")
    with timed(seconds, "ORM"):
        train_orm(args, problems.warm_up, model, folder / "orm")
    # From here on as with any reward models
    prm = ProcessRewardModel.from_pretrained(str(folder / "prm"), preset=PRM_PRESET)
    orm = OutcomeRewardModel.from_pretrained(str(folder / "orm"), preset=ORM_PRESET)

    def judge(name: str, solutions: list[str]) -> None:
        verdicts[f"PRM, {name}"] = judge_prm(prm, problems.held_out, solutions)
        verdicts[f"ORM, {name}"] = judge_orm(orm, problems.held_out, solutions)

    rng = random.Random(args.seed)
    judge("made mistakes", [solution_with_mistakes(problem, rng, ORM_MISTAKE_RATE) for problem in problems.held_out])
    judge("warmed-up policy", sample_solutions(policy, problems.held_out))
    caught = caught_mistakes(prm, problems.held_out, rng)
    before = evaluate(policy, problems.held_out)
    with timed(seconds, "GRPO"):
        functions = {"prm": prm, "orm": orm, "rule": rule}
        sources = {functions[name]: SOURCES[name] for name in args.sources} | WATCHED
        config = grpo_config(args, list(sources.values()))
        trainer = make_trainer(config, folder / "warmed_up", problems.grpo, list(sources))
        trainer.train()
    trainer.save_model(str(folder / "policy"))
    judge("trained policy", sample_solutions(trainer.model, problems.held_out))
    after = evaluate(trainer.model, problems.held_out)
    if state.is_main_process:
        log = [entry for entry in trainer.state.log_history if "kl" in entry]
        report(args, log, before, after, verdicts, caught, seconds)
    state.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser(RewardModelArguments).parse_args_and_config())
