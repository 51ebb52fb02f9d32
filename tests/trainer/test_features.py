"""
What the trainer does with rewards, masks, batches and prompts, through `train()` and `evaluate()` on tiny models.

Advantages are compared with the float64 loops of `tests/oracles.py`, from what the sources returned and from the mask
of the batch that was trained on.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, TrainerCallback
from trl import GRPOConfig

from tests.support import oracles
from tests.support.tiny_models import tiny_tokenizer
from tests.support.training import EOS, PROMPTS, FixedCompletions, RecordingExtTrainer, fixed_completions, moved_policy
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, StepRewards


nan = math.nan
G = 4
PROCESS = {"supervision": "process"}
EXACT = {"beta": 0.1, "kl_estimator": "exact"}


# ---------------------------------------------------------------------------------------------------------------------
# Small runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged_model(tiny_model, tmp_path_factory):
    """The tiny model with many end-of-sequence tokens, so that sampled completions end at different places."""
    folder = tmp_path_factory.mktemp("ragged") / "policy"
    shutil.copytree(tiny_model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [EOS, *range(5, 17)]}))
    return str(folder)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A sequence-classification reward model in a folder, with scores that differ."""
    folder = tmp_path_factory.mktemp("reward") / "tiny-reward"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **size)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(model, sources, folder, *, train_dataset=None, options=None, **config):
    """A trainer that generates eight completions of two groups for each update of plain SGD."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "per_device_train_batch_size": 2 * G,
        "num_generations": G,
        "max_completion_length": 8,
    }
    if train_dataset is None:
        train_dataset = Dataset.from_dict({"prompt": PROMPTS * 8})
    args = GRPOExtConfig(**(defaults | config))
    return RecordingExtTrainer(model, sources, args, train_dataset=train_dataset, **(options or {}))


def trained(*arguments, **keywords):
    trainer = build(*arguments, **keywords)
    trainer.train()
    return trainer


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def table(trainer, step):
    return pd.read_parquet(Path(trainer.args.output_dir) / "completions" / f"completions_{step:05d}.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Sources and what is expected of them
# ---------------------------------------------------------------------------------------------------------------------


def source(name, returned, *, asynchronous=False, reduce=None):
    """A source that returns a given reward for each row of [`FixedCompletions`]."""

    def judge(row, **kwargs):
        return [returned[index] for index in row]

    async def judge_later(row, **kwargs):
        return judge(row, **kwargs)

    function = judge_later if asynchronous else judge
    function.__name__ = name
    if reduce is not None:
        function.reduce = reduce
    return function


class Judge:
    """A source for sampled completions, which keeps what it saw and returned in each batch."""

    def __init__(self, reward, name="judge"):
        self.reward = reward
        self.__name__ = name
        self.seen, self.returned = [], []

    def __call__(self, completion_ids, **columns):
        self.seen.append({"completion_ids": completion_ids, **columns})
        self.returned.append([self.reward(ids) for ids in completion_ids])
        return self.returned[-1]


def every_other_token(ids):
    """A step at every second token and at the end, with a value from the token's id."""
    ends = sorted({*range(1, len(ids), 2), len(ids) - 1})
    return StepRewards(ends, [ids[end] % 7 / 8 for end in ends])


def long_enough(ids):
    return None if len(ids) == 1 else float(len(ids) % 3)


def on_tokens(returned, mask_NT):
    """
    `(N, T)` rewards as the design says: a float on the last loss token, a step's on its own or on the last loss token
    before a tool's output, those of a list on their own; NaN elsewhere.
    """
    rewards_NT = np.full(mask_NT.shape, nan)
    for row, value in enumerate(returned):
        if isinstance(value, StepRewards):
            for end, reward in zip(value.ends, value.values, strict=True):
                before = np.flatnonzero(mask_NT[row, : end + 1])
                token = before[-1] if len(before) else end
                rewards_NT[row, token] = np.nansum([rewards_NT[row, token], reward])
        elif isinstance(value, list):
            rewards_NT[row, : len(value)] = value
        elif value is not None and mask_NT[row].any():
            rewards_NT[row, mask_NT[row].nonzero()[0][-1]] = value
    return rewards_NT


def loss_mask(batch):
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).numpy()


def expected_advantages(returned_K, batch, *, weights=None, **options):
    mask_NT = loss_mask(batch)
    rewards_KNT = np.stack([on_tokens(returned, mask_NT) for returned in returned_K])
    options = {"estimator": "position", "gamma": 0.99, "group_size": G} | options
    group_size = options.pop("group_size")
    return oracles.process_advantages(rewards_KNT, mask_NT, weights or [1.0] * len(returned_K), group_size, **options)


def assert_advantages(batch, expected, atol=1e-5):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(batch["advantages"].numpy(), expected, rtol=1e-5, atol=atol)


# Eight completions of two groups with holes in the mask, and three sources that return every form there is. The last
# completion is judged by nobody; completion 5 only by a step that ends in a hole, and whose reward moves.
LENGTHS = [5, 3, 6, 1, 4, 5, 2, 4]
ROWS = fixed_completions(
    LENGTHS,
    env_mask=[[1, 1, 0, 1, 1], [1, 0, 1], [1] * 6, [1], [0, 0, 1, 1], [1, 0, 1, 1, 1], [1, 1], [1] * 4],
)
STEPS = [
    StepRewards([1, 4], [1.0, 0.5]),
    StepRewards([0], [0.25]),
    StepRewards([2, 3, 5], [0.5, -1.0, 0.75]),
    None,
    StepRewards([2, 3], [0.0, 1.0]),
    StepRewards([1], [0.375]),
    StepRewards([], []),
    None,
]
TOKENS = [
    [0.1, 0.2, 90.0, 0.4, 0.5],
    [0.3, -70.0, 0.7],
    [0.1, 0.0, 0.9, 0.0, 0.4, 0.2],
    [0.6],
    None,
    None,
    [0.5, 0.25],
    None,
]
MIXED = [1.0, StepRewards([0, 2], [0.5, 0.5]), None, 0.25, [60.0, 60.0, 0.75, 0.125], None, 2.0, None]


def rows(**changes):
    return FixedCompletions(**{"prompt_ids": ROWS.prompt_ids, "completion_ids": ROWS.completion_ids, **changes})


def masked_rows():
    return {"rollout_func": rows(env_mask=ROWS.env_mask)}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards to advantages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize(
    ("estimator", "unit", "baseline", "scale"),
    [
        ("position", "token", "all", "group"),
        ("position", "step", "active", "batch"),
        ("pooled", "token", "all", "batch"),
        ("step", "step", "all", "none"),
        ("min", "token", "all", "group"),
    ],
)
def test_every_form_of_reward_is_trained_on_as_the_oracle_says(
    tiny_model, tmp_path, estimator, unit, baseline, scale, aggregation
):
    one_gamma = aggregation == "sum_then_normalize" and estimator in ("pooled", "step")
    gamma, weights = 0.9 if one_gamma else [0.9, 0.5, 1.0], [0.5, -2.0, 1.5]
    sources = [source("steps", STEPS), source("tokens", TOKENS, asynchronous=True), source("mixed", MIXED)]
    trainer = trained(
        tiny_model,
        sources,
        tmp_path,
        options=masked_rows(),
        advantage_estimator=estimator,
        gamma=gamma,
        gamma_unit=unit,
        position_baseline=baseline,
        scale_rewards=scale,
        reward_weights=weights,
        multi_objective_aggregation=aggregation,
        **PROCESS,
    )
    (batch,) = trainer.batches
    expected = expected_advantages(
        [STEPS, TOKENS, MIXED],
        batch,
        weights=weights,
        gamma=gamma,
        estimator=estimator,
        gamma_unit=unit,
        baseline=baseline,
        aggregation=aggregation,
        scale=scale,
    )
    assert batch["advantages"].shape == (8, 6)
    assert_advantages(batch, expected)
    assert (batch["advantages"][7] == 0).all()


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_outcome_supervision_reduces_each_source_in_its_own_way(tiny_model, tmp_path, aggregation, eps):
    sources = [
        source("steps", STEPS, reduce="min"),
        source("tokens", TOKENS, reduce="last", asynchronous=True),
        source("mixed", MIXED, reduce="mean"),
    ]
    rewards_NK = [
        [0.5, 0.5, 1.0],
        [0.25, 0.7, 0.5],
        [-1.0, 0.2, nan],
        [nan, 0.6, 0.25],
        [0.0, nan, 30.21875],
        [0.375, nan, nan],
        [nan, 0.25, 2.0],
        [nan, nan, nan],
    ]
    weights = [0.5, -2.0, 1.5]
    trainer = trained(
        tiny_model,
        sources,
        tmp_path,
        options=masked_rows(),
        reward_weights=weights,
        multi_objective_aggregation=aggregation,
        advantage_eps=eps,
    )
    expected = oracles.trl_outcome_advantages(rewards_NK, weights, G, aggregation=aggregation, eps=eps)
    (batch,) = trainer.batches
    assert batch["advantages"].shape == (8,)
    assert_advantages(batch, expected)
    assert batch["advantages"][7] == 0
    for k, name in enumerate(["steps", "tokens", "mixed"]):
        assert logged(trainer, f"rewards/{name}/mean") == pytest.approx([np.nanmean(np.array(rewards_NK)[:, k])])


def test_transforms_belong_to_their_sources_and_come_first(tiny_model, tmp_path):
    values = [None if r is None else StepRewards(r.ends, [v / 2 for v in r.values]) for r in STEPS]
    sources = [source("plain", values), source("progress", values), source("clipped", MIXED)]
    trainer = trained(
        tiny_model,
        sources,
        tmp_path,
        options=masked_rows(),
        reward_transforms=["none", "progress", "clip:0.3"],
        **PROCESS,
    )
    progress = [
        None if r is None else StepRewards(r.ends, [v - u for u, v in zip([0.0, *r.values], r.values, strict=False)])
        for r in values
    ]

    def clip(value):
        return min(value - 0.3, 0.0)

    clipped = [
        None
        if r is None
        else StepRewards(r.ends, [clip(v) for v in r.values])
        if isinstance(r, StepRewards)
        else [clip(v) for v in r]
        if isinstance(r, list)
        else clip(r)
        for r in MIXED
    ]
    (batch,) = trainer.batches
    assert_advantages(batch, expected_advantages([values, progress, clipped], batch))


def test_a_batch_that_nobody_judges_moves_nothing(tiny_model, tmp_path):
    silent = [source("one", [None] * 8), source("two", [StepRewards([], [])] * 8)]
    trainer = build(tiny_model, silent, tmp_path, options=masked_rows(), **PROCESS)
    before = weights_of(trainer)
    trainer.train()
    assert (trainer.batches[0]["advantages"] == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    assert logged(trainer, "rewards/one/unjudged") == logged(trainer, "rewards/two/unjudged") == [1.0]
    assert logged(trainer, "rewards/one/steps") == [] and logged(trainer, "advantages/positive_share") == [0.0]


REAL = [1.0, None, 0.0, 2.0, 0.5, 1.0, None, 0.0]


@pytest.mark.parametrize("config", [PROCESS, {**PROCESS, "advantage_estimator": "pooled"}, {"advantage_eps": 1e-8}])
def test_a_weight_that_a_schedule_brings_to_0_takes_its_source_out_of_every_formula(tiny_model, tmp_path, config):
    def advantages_of(sources, folder):
        trainer = build(tiny_model, sources, tmp_path / folder, options=masked_rows(), **config)
        # As a callback does it
        trainer.reward_weights[1:] = 0.0
        trainer.train()
        return trainer.batches[0]["advantages"]

    real = source("real", REAL)
    alone = advantages_of([real], "alone")
    assert torch.equal(advantages_of([real, source("monitor", STEPS, reduce="min")], "watched"), alone)
    assert (alone[1] == 0).all() and (alone[3] != 0).any()


def test_trls_own_advantages_count_what_only_a_source_of_weight_0_judges_as_0(tiny_model, tmp_path):
    monitor = source("monitor", [0.25] * 8)
    trainer = trained(
        tiny_model, [source("real", REAL), monitor], tmp_path, options=masked_rows(), reward_weights=[1.0, 0.0]
    )
    as_judged = [[0.0 if reward is None else reward] for reward in REAL]
    assert_advantages(trainer.batches[0], oracles.trl_outcome_advantages(as_judged, [1.0], G))


BASELINE = {**PROCESS, "beta": 0.1, "loss_type": "grpo", "use_bias_correction_kl": False}


def observed(tiny_model, folder, **changes):
    trainer = trained(
        moved_policy(tiny_model),
        [source("steps", STEPS), source("mixed", MIXED)],
        folder,
        options=masked_rows(),
        **(BASELINE | changes),
    )
    return trainer.batches[0]["advantages"].tolist(), logged(trainer, "kl_loss")


@pytest.fixture(scope="module")
def observed_baseline(tiny_model, tmp_path_factory):
    return observed(tiny_model, tmp_path_factory.mktemp("baseline"))


ADVANTAGE_CHANGES = [
    {"supervision": "outcome"},
    {"advantage_estimator": "pooled"},
    {"advantage_estimator": "step"},
    {"advantage_estimator": "min"},
    {"position_baseline": "active"},
    {"gamma": [0.99, 0.5]},
    {"gamma_unit": "step"},
    {"advantage_eps": 0.1},
    {"reward_transforms": ["center", "none"]},
]
KL_CHANGES = [{"kl_estimator": "exact"}, {"kl_estimator": "k2"}, {"kl_reduction": "token_mean"}]


@pytest.mark.parametrize("change", [*ADVANTAGE_CHANGES, *KL_CHANGES], ids=str)
def test_every_field_acts_on_what_it_is_for_and_on_nothing_else(tiny_model, tmp_path, observed_baseline, change):
    advantages, kl_loss = observed(tiny_model, tmp_path, **change)
    assert (advantages != observed_baseline[0]) == (change in ADVANTAGE_CHANGES)
    assert (kl_loss != observed_baseline[1]) == (change in KL_CHANGES)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


BAD_REWARDS = {
    "short list": ([0.5, 0.5], "2 token rewards for a completion of 6 tokens"),
    "end out of range": (StepRewards([1, 6], [0.5, 0.5]), r"ends\[1\] is 6, outside the completion's 6 tokens"),
    "negative end": (StepRewards([-1], [0.5]), r"ends\[0\] is -1, outside the completion's 6 tokens"),
    "equal ends": (StepRewards([2, 2], [0.5, 0.5]), r"ends\[1\] is 2 after 2; ends must increase"),
    "value too few": (StepRewards([2, 3], [0.5]), "2 `ends` but 1 `values`"),
    "nan": (nan, "the reward is nan"),
    "infinite step": (StepRewards([2, 3], [0.5, -math.inf]), r"values\[1\] is -inf"),
    "infinite token": ([0.5] * 5 + [math.inf], r"token rewards\[5\] is inf"),
    "text": ("0.5", "got str"),
}


def assert_stops_before_anything_happens(trainer, error, message):
    before = weights_of(trainer)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.state.log_history == []
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    assert [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()] == []


# Under outcome supervision NaN is None, as in TRL
@pytest.mark.parametrize(
    ("case", "supervision"),
    [(case, s) for case in BAD_REWARDS for s in ("outcome", "process") if (case, s) != ("nan", "outcome")],
)
def test_a_bad_reward_stops_before_any_update_with_source_completion_and_field(
    tiny_model, tmp_path, case, supervision
):
    value, message = BAD_REWARDS[case]
    # One wrong completion of eight, in a source that is awaited in one of the two modes
    sources = [
        source("fine", [0.5] * 8),
        source("wrong", [0.5, 0.5, value, *[0.5] * 5], asynchronous=supervision == "process"),
    ]
    trainer = build(
        tiny_model, sources, tmp_path, options=masked_rows(), supervision=supervision, log_completions=True
    )
    error = TypeError if case == "text" else ValueError
    assert_stops_before_anything_happens(trainer, error, f"^reward source 'wrong', completion 2: .*{message}")


def test_a_wrong_number_of_rewards_stops_before_any_update(tiny_model, tmp_path):
    def judge(completions, **kwargs):
        return [0.5] * (len(completions) - 1)

    trainer = build(tiny_model, judge, tmp_path, **PROCESS)
    assert_stops_before_anything_happens(
        trainer, ValueError, "reward source 'judge' returned 7 rewards for 8 completions"
    )


def test_a_transform_that_needs_steps_stops_before_any_update(tiny_model, tmp_path):
    trainer = build(
        tiny_model, source("mixed", MIXED), tmp_path, options=masked_rows(), reward_transforms=["delta"], **PROCESS
    )
    message = "^reward source 'mixed', completion 0: transform 'delta' compares steps"
    assert_stops_before_anything_happens(trainer, ValueError, message)


def test_a_reward_model_that_gives_nan_stops_before_any_update_under_process_supervision(
    tiny_model, reward_model, tmp_path
):
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        model.score.weight.fill_(nan)
    trainer = build(tiny_model, model, tmp_path, **PROCESS)
    message = "^reward source 'tiny-reward', completion 0: the reward is nan"
    assert_stops_before_anything_happens(trainer, ValueError, message)
    # TRL takes NaN as no judgement
    assert (trained(tiny_model, model, tmp_path).batches[0]["advantages"] == 0).all()


TWO = [source("one", [0.5] * 8), source("two", [0.5] * 8)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gamma": [0.9, 0.8, 0.7], **PROCESS}, r"gamma has 3 entries for 2 reward sources \(one, two\)"),
        ({"reward_transforms": ["none"]}, r"reward_transforms has 1 entries for 2 reward sources \(one, two\)"),
        ({"reward_transforms": ["none"] * 3}, r"reward_transforms has 3 entries for 2 reward sources \(one, two\)"),
        ({"reward_weights": [1.0]}, r"[Nn]umber of reward weights \(1\).*\(2\)"),
        ({"prompt_separator": "<pad>", "options": {"rollout_func": rows()}}, "prompt_separator .* rollout_func"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_trainer_is_built(tiny_model, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model, list(TWO), tmp_path, **config)


def test_a_plain_config_is_refused(tiny_model, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="args must be a GRPOExtConfig, not GRPOConfig"):
        GRPOExtTrainer(tiny_model, TWO[0], args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}))


def test_without_a_config_the_defaults_are_taken(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which transformers refuses to plan for a machine without a GPU
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOExtTrainer(model=tiny_model, reward_funcs=TWO[0], train_dataset=dataset)
    assert type(trainer.args) is GRPOExtConfig and trainer.args.supervision == "outcome"
    assert trainer.args.output_dir == f"{Path(tiny_model).name}-GRPO"


def test_the_list_of_functions_stays_the_callers(tiny_model, tmp_path):
    functions = list(TWO)
    build(tiny_model, functions, tmp_path)
    assert functions == TWO


# ---------------------------------------------------------------------------------------------------------------------
# Reward models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", ["outcome", "process"])
@pytest.mark.parametrize("budget", [None, 40])
def test_a_reward_model_by_its_folder(tiny_model, reward_model, tmp_path, supervision, budget):
    prompts = []

    def tokens(row, **columns):
        prompts.extend(columns["prompts"])
        return [TOKENS[index] for index in row]

    trainer = build(
        tiny_model,
        [reward_model, tokens],
        tmp_path,
        options={"rollout_func": rows()},
        reward_batch_tokens=budget,
        reward_transforms=["center", "none"],
        supervision=supervision,
    )
    shapes = []
    for module in trainer.reward_funcs[0].modules():
        if isinstance(module, LlamaForSequenceClassification):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
            )
    trainer.train()
    (batch,) = trainer.batches

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    texts = [
        prompt + tokenizer.decode(ids, skip_special_tokens=True)
        for prompt, ids in zip(prompts, ROWS.completion_ids, strict=True)
    ]
    encoded = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    with torch.no_grad():
        scores = [2 * model(**inputs).logits.item() - 1 for inputs in encoded]
    lengths = sorted((inputs["input_ids"].size(1) for inputs in encoded), reverse=True)
    if budget is None:
        assert shapes == [(8, lengths[0])]
    else:
        assert len(shapes) > 1 and all(count * width <= budget for count, width in shapes)
        assert sum(count for count, _ in shapes) == 8 and shapes[0][1] == lengths[0]

    if supervision == "process":
        expected = expected_advantages([scores, TOKENS], batch)
    else:
        rewards = [[score, nan if t is None else sum(t)] for score, t in zip(scores, TOKENS, strict=True)]
        expected = oracles.trl_outcome_advantages(rewards, [1.0, 1.0], G)
    assert logged(trainer, "rewards/tiny-reward/mean") == pytest.approx([np.mean(scores)], rel=1e-5)
    assert_advantages(batch, expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Sampled completions
# ---------------------------------------------------------------------------------------------------------------------


def assert_trained_as_judged(trainer, judges, **options):
    """Every batch that was generated has the oracle's advantages for what the sources returned about it."""
    assert len(trainer.batches) == len(judges[0].returned)
    for number, batch in enumerate(trainer.batches):
        lengths = loss_mask(batch).sum(1).tolist()
        assert lengths == [len(ids) for ids in judges[0].seen[number]["completion_ids"]]
        expected = expected_advantages([judge.returned[number] for judge in judges], batch, **options)
        assert_advantages(batch, expected)


CONVERSATION = "{% for m in messages %}{{ m['role'][0] }};{{ m['content'] }}<sep>{% endfor %}"
CONVERSATION += "{% if add_generation_prompt %}a;{% endif %}"
ANSWERS = {"1+2=": "3", "3+4=": "7", "ab": "c", "cd": "e"}


def conversational():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CONVERSATION
    prompts = [[{"role": "user", "content": prompt}] for prompt in ANSWERS]
    return Dataset.from_dict({"prompt": prompts * 4, "answer": list(ANSWERS.values()) * 4}), tokenizer


def test_conversational_prompts_with_a_chat_template(ragged_model, tmp_path):
    dataset, tokenizer = conversational()
    judges = [Judge(every_other_token, "steps"), Judge(long_enough, "outcome")]
    trainer = trained(
        ragged_model,
        judges,
        tmp_path,
        train_dataset=dataset,
        options={"processing_class": tokenizer},
        **PROCESS,
        **EXACT,
    )
    assert_trained_as_judged(trainer, judges)
    seen = judges[0].seen[0]
    assert all(answer == ANSWERS[p[0]["content"]] for p, answer in zip(seen["prompts"], seen["answer"], strict=True))
    contents = tokenizer.batch_decode(seen["completion_ids"], skip_special_tokens=True)
    assert seen["completions"] == [[{"role": "assistant", "content": content}] for content in contents]


def test_an_iterable_dataset(ragged_model, tmp_path):
    judges = [Judge(every_other_token, "steps"), Judge(long_enough, "outcome")]
    dataset = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS * 4))
    trainer = trained(ragged_model, judges, tmp_path, train_dataset=dataset, max_steps=2, **PROCESS)
    assert_trained_as_judged(trainer, judges)
    for seen in judges[0].seen:
        assert [len(set(seen["prompts"][start : start + G])) for start in (0, G)] == [1, 1]


def test_generated_batches_are_reused_over_steps_and_iterations(ragged_model, tmp_path):
    judges = [Judge(every_other_token, "steps"), Judge(long_enough, "outcome")]
    trainer = build(
        ragged_model,
        judges,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        # Four updates to each generated batch
        max_steps=8,
        **PROCESS,
        **EXACT,
    )
    reference_rows = []
    trainer.ref_model.register_forward_pre_hook(
        lambda _, args, kwargs: reference_rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert len(trainer.batches) == 2 and reference_rows == [2] * 8
    assert_trained_as_judged(trainer, judges)
    divergences = logged(trainer, "kl")
    # The two halves of the batch before and after the weights moved for the first time
    assert divergences[0] < 1e-8 and min(divergences[1:]) > 1e-6
    assert logged(trainer, "kl_loss")[1:] != pytest.approx([0.0] * 7)
    for step in range(8):
        total = logged(trainer, "policy_loss")[step] + logged(trainer, "kl_loss")[step]
        assert logged(trainer, "loss")[step] == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(ragged_model, tmp_path):
    forwards = {"plain": 0, "checkpointed": 0}

    def run(name):
        options = {"gradient_checkpointing": name == "checkpointed", "max_steps": 2, "num_iterations": 2}
        policy = moved_policy(ragged_model)
        trainer = build(policy, [Judge(every_other_token)], tmp_path / name, **options, **PROCESS, **EXACT)

        def count(*_):
            forwards[name] += 1

        policy.model.layers[0].mlp.register_forward_pre_hook(count)
        trainer.train()
        return trainer

    plain, checkpointed = run("plain"), run("checkpointed")
    # One more in the backward of each of the two updates
    assert forwards["checkpointed"] == forwards["plain"] + 2
    assert logged(plain, "kl") == pytest.approx(logged(checkpointed, "kl"), rel=1e-6)
    before = weights_of(build(moved_policy(ragged_model), TWO[0], tmp_path / "before"))
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(checkpointed)[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, before[name])


def test_a_run_that_is_resumed_ends_where_the_straight_run_does(ragged_model, tmp_path):
    def run(**options):
        settings = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01, "save_steps": 2}
        judges = [Judge(every_other_token, "steps"), Judge(long_enough, "outcome")]
        return build(ragged_model, judges, tmp_path, **(settings | options), **PROCESS, **EXACT)

    straight = run(save_strategy="steps")
    straight.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.batches) == 2
    for name in ("loss", "kl", "kl_loss", "reward", "advantages/positive_share", "rewards/steps/step_mean"):
        assert logged(resumed, name) == logged(straight, name)
    assert logged(straight, "kl")[-1] > 1e-6
    for name, value in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], value)


@pytest.mark.parametrize("separator", ["<sep>", "=;"])
def test_the_separator_ends_every_prompt_that_is_sampled_from_and_trained_on(ragged_model, tmp_path, separator):
    tokenizer = tiny_tokenizer()
    separator_ids = tokenizer(separator)["input_ids"]
    judge = Judge(every_other_token)
    dataset = Dataset.from_dict({"prompt": ["12", "3+4"]})
    trainer = build(
        ragged_model,
        judge,
        tmp_path,
        options={"eval_dataset": dataset},
        train_dataset=dataset,
        prompt_separator=separator,
        per_device_eval_batch_size=2 * G,
        **PROCESS,
        **EXACT,
    )
    sampled_from, generate = [], trainer.model.generate

    def recorded(input_ids, attention_mask, **kwargs):
        sampled_from.extend(ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    trainer.model.generate = recorded
    trainer.train()
    trainer.evaluate()
    trained_on = [
        ids[mask == 1].tolist()
        for batch in trainer.batches
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    prompts = [prompt for seen in judge.seen for prompt in seen["prompts"]]
    assert len(prompts) == 4 * G and set(prompts) == {"12", "3+4"}
    assert sampled_from == trained_on == [tokenizer(prompt)["input_ids"] + separator_ids for prompt in prompts]


def test_a_separator_without_tokens_is_refused(tiny_model, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match="prompt_separator ' ' has no tokens"):
        build(tiny_model, TWO[0], tmp_path, options={"processing_class": tokenizer}, prompt_separator=" ")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations", [1, 2])
def test_evaluation_during_training_has_groups_of_its_own(ragged_model, tmp_path, generations):
    judges = [Judge(every_other_token, "steps"), Judge(long_enough, "outcome")]
    trainer = trained(
        ragged_model,
        judges,
        tmp_path,
        options={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=generations,
        per_device_eval_batch_size=4,
        log_completions=True,
        **PROCESS,
        **EXACT,
    )
    training = [batch for batch in trainer.batches if len(batch["advantages"]) == 2 * G]
    evaluation = [batch for batch in trainer.batches if len(batch["advantages"]) == 4]
    assert (len(training), len(evaluation)) == (2, 2 * generations)
    shares = []
    for number, batch in enumerate(trainer.batches):
        sizes = {"group_size": G if len(batch["advantages"]) == 2 * G else generations}
        expected = expected_advantages([judge.returned[number] for judge in judges], batch, **sizes)
        np.testing.assert_allclose(batch["advantages"].numpy(), expected, rtol=1e-5, atol=1e-5)
        if len(batch["advantages"]) == 4:
            shares.append((expected > 0).sum() / loss_mask(batch).sum())
    assert all((batch["advantages"] != 0).any() for batch in evaluation) == (generations > 1)
    per_evaluation = np.array(shares).reshape(2, generations).mean(1)
    assert logged(trainer, "eval_advantages/positive_share") == pytest.approx(list(per_evaluation), rel=1e-6)
    # KL of the policy that has moved, on what it has just sampled
    assert min(logged(trainer, "eval_kl")) > 1e-8
    # The table keeps as many rows as are generated for training, the newest last
    newest = np.concatenate([means(batch) for batch in trainer.batches])[-2 * G :]
    np.testing.assert_allclose(table(trainer, 2)["advantage"], newest, rtol=1e-5, atol=1e-6)


def means(batch):
    mask_NT = loss_mask(batch)
    return (batch["advantages"].numpy() * mask_NT).sum(1) / np.maximum(mask_NT.sum(1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Masks and padding
# ---------------------------------------------------------------------------------------------------------------------


def truncated(*indices):
    """The completions with those at `indices` cut off before their end."""
    return [ids[:-1] + [20] if row in indices else ids for row, ids in enumerate(ROWS.completion_ids)]


def test_a_truncated_completion_changes_the_advantages_of_no_other(tiny_model, tmp_path):
    def run(name, completion_ids, tokens):
        return trained(
            moved_policy(tiny_model),
            [source("tokens", tokens), source("steps", STEPS)],
            tmp_path / name,
            options={"rollout_func": rows(completion_ids=completion_ids, env_mask=ROWS.env_mask)},
            mask_truncated_completions=True,
            multi_objective_aggregation="normalize_then_sum",
            **PROCESS,
            **EXACT,
        )

    cut = [0, 4]
    plain = run("plain", truncated(*cut), TOKENS)
    poisoned = [[1e4] * LENGTHS[row] if row in cut else r for row, r in enumerate(TOKENS)]
    loud = run("loud", truncated(*cut), poisoned)
    (batch,) = plain.batches
    assert batch["completion_mask"].sum(1).tolist() == [0, 3, 6, 1, 0, 5, 2, 4]
    assert torch.equal(loud.batches[0]["advantages"], batch["advantages"])
    assert (batch["advantages"][cut] == 0).all()
    # As if nobody had judged them, where nothing is truncated
    absent = [[None if row in cut else r for row, r in enumerate(returned)] for returned in (TOKENS, STEPS)]
    whole = {
        "completion_mask": (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long(),
        "tool_mask": torch.tensor([mask + [1] * (6 - len(mask)) for mask in ROWS.env_mask]),
    }
    assert_advantages(batch, expected_advantages(absent, whole, aggregation="normalize_then_sum"))
    for name, value in weights_of(plain).items():
        assert torch.equal(weights_of(loud)[name], value)


def test_a_batch_of_truncated_completions_only_moves_nothing(tiny_model, tmp_path):
    trainer = build(
        moved_policy(tiny_model),
        source("steps", STEPS),
        tmp_path,
        options={"rollout_func": rows(completion_ids=truncated(*range(8)))},
        mask_truncated_completions=True,
        **PROCESS,
        **EXACT,
    )
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    assert logged(trainer, "kl") == logged(trainer, "loss") == [0.0]


def test_padding_to_a_multiple_changes_nothing(tiny_model, tmp_path):
    def run(name, **options):
        sources = [source("tokens", TOKENS), source("mixed", MIXED)]
        options |= {"options": masked_rows(), **PROCESS, **EXACT}
        return trained(moved_policy(tiny_model), sources, tmp_path / name, **options)

    plain, padded = run("plain"), run("padded", pad_to_multiple_of=16)
    width = plain.batches[0]["advantages"].size(1)
    advantages = padded.batches[0]["advantages"]
    assert advantages.shape == (8, 16) and (advantages[:, width:] == 0).all()
    assert torch.equal(advantages[:, :width], plain.batches[0]["advantages"])
    assert logged(padded, "kl") == pytest.approx(logged(plain, "kl"), rel=1e-5)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(padded)[name], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The exact KL beside token advantages
# ---------------------------------------------------------------------------------------------------------------------


def divergence(policy, reference, row, temperature=1.0):
    """Exact KL at the loss tokens of one row, 0 at the others, from float64 softmaxes of the models' own logits."""
    prompt, ids, mask = ROWS.prompt_ids[row], ROWS.completion_ids[row], ROWS.env_mask[row]
    with torch.no_grad():
        logits = [
            m(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] for m in (policy, reference)
        ]
    logp, ref_logp = ((logit.double() / temperature).log_softmax(-1) for logit in logits)
    return ((logp.exp() * (logp - ref_logp)).sum(-1) * torch.tensor(mask)).numpy()


@pytest.fixture(scope="module")
def dense_divergence(tiny_model):
    policy, reference = moved_policy(tiny_model), moved_policy(tiny_model, distance=0.0)
    return [divergence(policy, reference, row, temperature=0.9) for row in range(8)]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_with_token_advantages_and_the_exact_kl(tiny_model, tmp_path, dense_divergence, loss_type):
    trainer = build(
        moved_policy(tiny_model),
        [source("tokens", TOKENS), source("steps", STEPS)],
        tmp_path,
        options=masked_rows(),
        loss_type=loss_type,
        temperature=0.9,
        **PROCESS,
        **EXACT,
    )
    before = weights_of(trainer)
    trainer.train()
    sums, counts = [d.sum() for d in dense_divergence], [sum(mask) for mask in ROWS.env_mask]
    reduced = {
        "grpo": np.mean([s / n for s, n in zip(sums, counts, strict=True)]),
        "dr_grpo": sum(sums) / (8 * 8),
        "luspo": np.mean(sums),
        "dapo": sum(sums) / sum(counts),
    }
    same = {"sapo": "grpo", "bnpo": "dapo", "cispo": "dapo", "vespo": "dapo"}
    assert logged(trainer, "kl") == pytest.approx([sum(sums) / sum(counts)], rel=1e-4)
    assert logged(trainer, "kl_loss") == pytest.approx([0.1 * reduced[same.get(loss_type, loss_type)]], rel=1e-4)
    policy_and_kl = logged(trainer, "policy_loss")[0] + logged(trainer, "kl_loss")[0]
    assert logged(trainer, "loss") == pytest.approx([policy_and_kl], rel=1e-4)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


class DenseDivergence(TrainerCallback):
    """Mean exact KL to a fixed reference over the loss tokens of the rows, at the beginning of every update."""

    def __init__(self, reference):
        self.reference = reference
        self.values = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        total = sum(divergence(model, self.reference, row).sum().item() for row in range(8))
        self.values.append(total / sum(map(sum, ROWS.env_mask)))


def test_a_batch_keeps_its_reference(tiny_model, tmp_path):
    dense = DenseDivergence(moved_policy(tiny_model, distance=0.0))
    trainer = trained(
        tiny_model,
        source("steps", STEPS),
        tmp_path,
        options={**masked_rows(), "callbacks": [dense]},
        num_iterations=3,
        max_steps=3,
        learning_rate=3.0,
        **PROCESS,
        **EXACT,
    )
    assert dense.values[1] > 0.01
    assert logged(trainer, "kl") == pytest.approx(dense.values, rel=1e-4, abs=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What is logged
# ---------------------------------------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_loss_tokens(tiny_model, tmp_path):
    trainer = trained(
        tiny_model, [source("steps", STEPS), source("mixed", MIXED)], tmp_path, options=masked_rows(), **PROCESS
    )
    entry = trainer.state.log_history[0]
    by_hand = {
        # 1, 0.5 | 0.25 | 0.5, -1, 0.75 | 0, 1 | 0.375, which was given in a hole
        "steps": ([1.0, 0.5, 0.25, 0.5, -1.0, 0.75, 0.0, 1.0, 0.375], 9 / 5, 3 / 8),
        # 1 | 0.5, 0.5 | 0.25 | 0.75, 0.125 | 2
        "mixed": ([1.0, 0.5, 0.5, 0.25, 0.75, 0.125, 2.0], 7 / 5, 3 / 8),
    }
    for name, (values, steps, unjudged) in by_hand.items():
        assert entry[f"rewards/{name}/step_mean"] == pytest.approx(np.mean(values))
        assert entry[f"rewards/{name}/step_std"] == pytest.approx(np.std(values, ddof=1))
        assert entry[f"rewards/{name}/steps"] == pytest.approx(steps)
        assert entry[f"rewards/{name}/unjudged"] == pytest.approx(unjudged)
    (batch,) = trainer.batches
    expected = expected_advantages([STEPS, MIXED], batch)
    assert entry["advantages/positive_share"] == pytest.approx((expected > 0).sum() / loss_mask(batch).sum())


def test_under_outcome_supervision_the_positive_share_is_that_of_completions(tiny_model, tmp_path):
    outcome = [1.0, 0.0, 0.0, None, 3.0, 2.0, 0.5, 0.0]
    trainer = trained(tiny_model, source("outcome", outcome), tmp_path, options=masked_rows(), log_completions=True)
    entry = trainer.state.log_history[0]
    assert entry["advantages/positive_share"] == pytest.approx(3 / 8)
    assert entry["rewards/outcome/unjudged"] == pytest.approx(1 / 8)
    expected = oracles.trl_outcome_advantages([[nan if r is None else r] for r in outcome], [1.0], G)
    np.testing.assert_allclose(table(trainer, 1)["advantage"], expected, rtol=1e-5, atol=1e-6)


def test_the_completions_table_shows_what_was_trained_on(ragged_model, tmp_path):
    def steps(completion_ids, completions, log_metric, log_extra, **kwargs):
        log_metric("longest", float(max(len(ids) for ids in completion_ids)))
        log_extra("shouted", [text.upper() for text in completions])
        return [every_other_token(ids) for ids in completion_ids]

    judge = Judge(long_enough, "outcome")
    trainer = trained(
        ragged_model,
        [steps, judge],
        tmp_path,
        per_device_train_batch_size=G,
        gradient_accumulation_steps=2,
        max_steps=2,
        log_completions=True,
        **PROCESS,
    )
    assert len(trainer.batches) == 2
    for step, (batch, seen) in enumerate(zip(trainer.batches, judge.seen, strict=True), start=1):
        written = table(trainer, step)
        np.testing.assert_allclose(written["advantage"], means(batch), rtol=1e-5, atol=1e-6)
        assert np.abs(written["advantage"]).max() > 0.1
        assert list(written["completion"]) == seen["completions"]
        assert list(written["shouted"]) == [text.upper() for text in seen["completions"]]
        sums = [math.fsum(every_other_token(ids).values) for ids in seen["completion_ids"]]
        np.testing.assert_allclose(written["steps"], sums, rtol=1e-6)
        longest = max(len(ids) for ids in seen["completion_ids"])
        assert logged(trainer, "longest")[step - 1] == longest


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------


class Arithmetic:
    """An environment without tools, which judges by itself: every second rollout not at all."""

    made = []

    def __init__(self):
        self.number = len(self.made)
        self.made.append(self)

    def reset(self, answer, **kwargs):
        self.answer = answer

    def get_reward(self):
        return None if self.number % 2 else float(self.answer.isdigit()) + self.number


def test_an_environment_with_a_reward_is_one_more_source(ragged_model, tmp_path):
    dataset, tokenizer = conversational()
    tokenizer.chat_template = CONVERSATION.replace(
        "<sep>",
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<sep>",
    )
    judge = Judge(every_other_token, "steps")
    Arithmetic.made = []
    trainer = trained(
        ragged_model,
        [judge],
        tmp_path,
        train_dataset=dataset,
        options={"processing_class": tokenizer, "environment_factory": Arithmetic},
        gamma=[0.9, 1.0],
        reward_transforms=["none", "center"],
        **PROCESS,
    )
    (batch,) = trainer.batches
    of_environment = [
        None if number % 2 else 2 * (float(answer.isdigit()) + number) - 1
        for number, answer in enumerate(judge.seen[0]["answer"])
    ]
    assert_advantages(batch, expected_advantages([judge.returned[0], of_environment], batch, gamma=[0.9, 1.0]))
    assert logged(trainer, "rewards/Arithmetic/unjudged") == [0.5]
