"""A process and an outcome reward model of 0.2 million parameters: built, trained and saved as on the Hub."""

import random
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Trainer,
    TrainingArguments,
)

from running_sums.mistakes import EQUATION, solution_with_mistakes
from running_sums.task import EOS, LARGEST_VALUE, exact_steps, right_answer, solution_steps
from trl_grpo_ext import Preset


# Probability that a step is wrong; about half of the steps, and of the answers, are then right
PRM_MISTAKE_RATE = 0.5
ORM_MISTAKE_RATE = 0.15
BATCH = 64
IGNORED = -100
# `3`, `+`, `4`, `=`, `7`, `;`
TOKENS_OF_A_STEP = 6


def build_reward_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as large models have it, with one token for each whole number up to 28."""
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


def reward_config(tokenizer: PreTrainedTokenizerFast, layers: int, **settings: Any) -> Qwen3Config:
    """
    A transformer that learns the task within a minute on a CPU.

    It is no Qwen2: for a folder with a Qwen2 model, transformers loads Qwen2's own tokenizer and not the saved one.
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
        # The first layers see one sum, `3+4=7`. Attention over the whole text takes long to learn where its terms are
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * (layers - 2),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # The default is for large models; with it, the weights of this one start too close to 0
        initializer_range=0.1,
        classifier_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def label_steps(tokenizer: PreTrainedTokenizerFast, preset: Preset, problem: str, solution: str) -> dict:
    """
    A solution as the PRM reads it. The tag after a step has label 1 if the step is right, else 0.

    The numbers of a step have labels too: whether it starts from the value stated before, takes the next term, and
    adds up. The PRM's scores are read at the tags alone. With the labels of the numbers it learns those of the tags
    several times faster.
    """
    steps = solution_steps(solution)
    ids, start, tags = preset.rendering.render(tokenizer, problem, steps)
    labels = [IGNORED] * len(ids)
    for tag, step, exact in zip(tags, steps, exact_steps(problem, steps), strict=True):
        labels[tag] = int(step == exact)
        written = EQUATION.fullmatch(step)
        wanted = EQUATION.fullmatch(exact)
        # A number that is too large to be one token shifts those after it
        if written and wanted and tag - start == TOKENS_OF_A_STEP:
            labels[start] = int(written[1] == wanted[1])
            labels[start + 2] = int(written[2] == wanted[2])
            labels[start + 4] = int(int(written[1]) + int(written[2]) == int(written[3]))
        start = tag + 1
    return {"input_ids": ids, "labels": labels}


def label_solution(tokenizer: PreTrainedTokenizerFast, preset: Preset, problem: str, solution: str) -> dict:
    """A solution as the ORM reads it, with label 1 if its answer is right, else 0."""
    rendered = preset.rendering.render(tokenizer, problem, [solution])
    return {"input_ids": rendered.ids, "labels": [float(right_answer(problem, solution + EOS))]}


def fit(model: PreTrainedModel, collator: Any, examples: list[dict], folder: Path, **settings: Any) -> None:
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
        # All parameters are used; with several processes, DDP would search for unused ones and warn
        ddp_find_unused_parameters=False,
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        **settings,
    )
    dataset = Dataset.from_list(examples)
    trainer = Trainer(model, args, collator, train_dataset=dataset, processing_class=collator.tokenizer)
    trainer.train()
    trainer.save_model(str(folder))


def train_prm(problems: list[str], preset: Preset, folder: Path, *, updates: int, seed: int) -> PreTrainedModel:
    """A token classifier that learns to tell right steps from wrong ones."""
    tokenizer = build_reward_tokenizer()
    rng = random.Random(seed)
    chosen = rng.choices(problems, k=updates * BATCH)
    examples = []
    for problem in chosen:
        solution = solution_with_mistakes(problem, rng, PRM_MISTAKE_RATE)
        examples.append(label_steps(tokenizer, preset, problem, solution))
    model = Qwen3ForTokenClassification(reward_config(tokenizer, layers=3, num_labels=2))
    collator = DataCollatorForTokenClassification(tokenizer)
    fit(model, collator, examples, folder, max_steps=updates, learning_rate=3e-3, seed=seed)
    return model


def train_orm(
    problems: list[str], preset: Preset, prm: PreTrainedModel, folder: Path, *, updates: int, seed: int
) -> PreTrainedModel:
    """
    A sequence classifier that learns to tell solutions with the right answer from the others.

    It starts from the PRM, which can already judge steps, and has one more layer.
    """
    tokenizer = build_reward_tokenizer()
    rng = random.Random(seed + 1)
    chosen = rng.choices(problems, k=updates * BATCH)
    examples = []
    for problem in chosen:
        solution = solution_with_mistakes(problem, rng, ORM_MISTAKE_RATE)
        examples.append(label_solution(tokenizer, preset, problem, solution))
    # With this type, the loss of the single label is a binary cross-entropy
    config = reward_config(tokenizer, layers=4, num_labels=1, problem_type="multi_label_classification")
    model = Qwen3ForSequenceClassification(config)
    model.model.load_state_dict(prm.model.state_dict(), strict=False)
    collator = DataCollatorWithPadding(tokenizer)
    fit(model, collator, examples, folder, max_steps=updates, learning_rate=1e-3, seed=seed)
    return model
