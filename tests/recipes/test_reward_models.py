"""The reward-model recipe: its labels by arithmetic of another kind, its models saved and loaded, a short run."""

import json
import random
import re
from itertools import zip_longest

import pytest
import reward_models as recipe
import torch
from running_sums.mistakes import MISTAKES, solution_with_mistakes
from running_sums.reward_quality import compare
from running_sums.reward_training import (
    IGNORED,
    build_reward_tokenizer,
    label_solution,
    label_steps,
    train_orm,
    train_prm,
)
from running_sums.task import EOS, TOKENIZER, make_problem, solution_steps, worked_solution

from trl_grpo_ext import GRPOExtTrainer, OutcomeRewardModel, ProcessRewardModel


PROBLEM = "3+14-2="
TINY = {"max_steps": 2, "num_prompts": 2, "num_generations": 4, "num_held_out": 16, "warmup_steps": 2}


def judged_by_hand(problem: str, solution: str) -> list[bool]:
    """Steps right or wrong, by reading them: what each starts from, its term, whether the equation holds."""
    first, terms = re.match(r"\d+", problem)[0], re.findall(r"[+-]\d+", problem)
    stated, right = first, []
    for step, term in zip_longest(re.findall(r"[^;]*;|[^;]+$", solution), [*terms, None]):
        if step is None:
            break
        equation = re.fullmatch(r"(-?\d+)([+-]\d+)=(-?\d+);", step)
        if term is None:
            right.append(len(right) == len(terms) and step == f"#{stated}")
        else:
            parts = equation and (equation[1], equation[2], int(equation[1]) + int(equation[2]))
            right.append(bool(equation) and parts == (stated, term, int(equation[3])) and equation[3] == str(parts[2]))
        ending = re.search(r"=(-?\d+);$", step)
        stated = ending[1] if ending else None
    return right


def labels_at_tags(tokenizer, labelled: dict) -> list[bool]:
    tag = tokenizer.convert_tokens_to_ids("<step>")
    pairs = zip(labelled["input_ids"], labelled["labels"], strict=True)
    return [bool(label) for token, label in pairs if token == tag]


def random_problems(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(number)]


def test_labels_are_exact_arithmetic():
    tokenizer, rng = build_reward_tokenizer(), random.Random(0)
    right = []
    for problem in random_problems(1, 3000):
        solution = solution_with_mistakes(problem, rng, 0.5)
        labels = labels_at_tags(tokenizer, label_steps(tokenizer, recipe.PRM_PRESET, problem, solution))
        assert labels == judged_by_hand(problem, solution), (problem, solution)
        right += labels
    assert 0.4 < sum(right) / len(right) < 0.6


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_wrong_step(mistake):
    rng = random.Random(0)
    for _ in range(3000):
        value, term = str(rng.randint(0, 19)), f"{rng.choice([-9, -5, -1, 1, 4, 9]):+d}"
        step = mistake(value, term, rng)
        assert not all(judged_by_hand(f"{value}{term}=", step)), (value, term, step)


def test_without_mistakes_all_is_right():
    tokenizer = build_reward_tokenizer()
    for problem in random_problems(2, 500):
        solution = worked_solution(problem)
        labelled = label_steps(tokenizer, recipe.PRM_PRESET, problem, solution)
        assert set(labelled["labels"]) == {IGNORED, 1}
        assert label_solution(tokenizer, recipe.ORM_PRESET, problem, solution)["labels"] == [1.0]
        wrong = f"{solution.partition('#')[0]}#{eval(problem[:-1]) + 1}"
        assert label_solution(tokenizer, recipe.ORM_PRESET, problem, wrong)["labels"] == [0.0]


def test_labels_stand_on_the_tokens_of_the_steps():
    tokenizer = build_reward_tokenizer()
    labelled = label_steps(tokenizer, recipe.PRM_PRESET, PROBLEM, "3+14=17;17-3=14;#14")
    ids, labels = labelled["input_ids"], labelled["labels"]
    # Whole numbers, where the policy has a token for each digit
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *"3 + 14 - 2 =".split(),
        *"3 + 14 = 17 ; <step>".split(),
        *"17 - 3 = 14 ; <step>".split(),
        *"# 14 <step>".split(),
    ]
    n = IGNORED
    assert labels == [n] * 6 + [1, n, 1, n, 1, n, 1] + [1, n, 0, n, 1, n, 0] + [n, n, 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe's models after two updates, as they are in memory, and their folder."""
    folder = tmp_path_factory.mktemp("models")
    problems = random_problems(3, 64)
    prm = train_prm(problems, recipe.PRM_PRESET, folder / "prm", updates=2, seed=0)
    orm = train_orm(problems, recipe.ORM_PRESET, prm, folder / "orm", updates=2, seed=0)
    return prm.eval(), orm.eval(), folder


SOLUTIONS = ["3+14=17;17-2=15;#15", "3+14=1;;1-2=", "#4"]


@torch.no_grad()
def test_scores_of_the_loaded_prm_are_those_of_the_trained_model(trained):
    model, _, folder = trained
    prm = ProcessRewardModel.from_pretrained(str(folder / "prm"), preset=recipe.PRM_PRESET)
    prm.policy_tokenizer = TOKENIZER
    assert [prm.split(solution) for solution in SOLUTIONS] == [solution_steps(solution) for solution in SOLUTIONS]
    completions = [TOKENIZER(solution + EOS).input_ids for solution in SOLUTIONS]
    rewards = prm([PROBLEM] * len(SOLUTIONS), completion_ids=completions)
    assert [one.ends for one in rewards] == [[7, 15, 18], [6, 7, 11], [1]]
    # That of the training, since loading may change a tokenizer
    tokenizer = build_reward_tokenizer()
    tag = tokenizer.convert_tokens_to_ids("<step>")
    for solution, one in zip(SOLUTIONS, rewards, strict=True):
        ids = torch.tensor([label_steps(tokenizer, recipe.PRM_PRESET, PROBLEM, solution)["input_ids"]])
        expected = model(input_ids=ids).logits.softmax(-1)[..., 1][ids == tag]
        torch.testing.assert_close(torch.tensor(one.values), expected, atol=1e-5, rtol=0)
    assert len({round(value, 3) for one in rewards for value in one.values}) > 3


@torch.no_grad()
def test_scores_of_the_loaded_orm_are_those_of_the_trained_model(trained):
    _, model, folder = trained
    orm = OutcomeRewardModel.from_pretrained(str(folder / "orm"), preset=recipe.ORM_PRESET)
    for solution, score in zip(SOLUTIONS, orm.score(PROBLEM, SOLUTIONS), strict=True):
        labelled = label_solution(build_reward_tokenizer(), recipe.ORM_PRESET, PROBLEM, solution)
        ids = torch.tensor([labelled["input_ids"]])
        assert score == pytest.approx(model(input_ids=ids).logits.sigmoid().item(), abs=1e-5)


def test_balanced_accuracy_and_auc():
    verdict = compare([0.9, 0.7, 0.6, 0.2, 0.6, 0.2], [True, True, False, False, False, False])
    assert verdict == pytest.approx((0.75, 1.0, 1 / 3, 3.2 / 6))
    assert compare([0.4, 0.4, 0.3], [True, False, False]) == pytest.approx((0.5, 0.75, 1 / 3, 1.1 / 3))


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        pytest.param("3+14=17;17-2=15;#15<eos>", 1.0, id="right"),
        pytest.param("3+14=8;0-2=7;#4<eos>", 1.0, id="nothing adds up"),
        pytest.param("3+14=17;17-2=15;#15", 0.0, id="has not ended"),
        pytest.param("#15<eos>", 0.0, id="no steps"),
        pytest.param("3+14=17;17-2=15;<eos>", 0.0, id="no answer"),
        pytest.param("3+14=17;17-3=14;#14<eos>", 0.0, id="not the problem's term"),
        pytest.param("3+14=17;17-2=15;15-2=13;#13<eos>", 0.0, id="a step too many"),
        pytest.param("3+14=17;17-2=15#15<eos>", 0.0, id="a step without end"),
    ],
)
def test_the_rule_asks_for_form_terms_and_end(completion, reward):
    assert recipe.rule([PROBLEM], [TOKENIZER(completion).input_ids]) == [reward]


def test_short_run(tmp_path, monkeypatch):
    trained_on = []

    class RecordedTrainer(GRPOExtTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trained_on.append(self)

    monkeypatch.setattr(recipe, "GRPOExtTrainer", RecordedTrainer)
    recipe.main(recipe.RewardModelArguments(str(tmp_path), **TINY, prm_steps=2, orm_steps=2, sources=["prm", "rule"]))
    (trainer,) = trained_on
    assert trainer.reward_func_names == ["prm", "rule", "judge_steps", "judge_answer"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0, 0.0, 0.0]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"accuracy_before", "accuracy_after", "seconds", "reward_models", "caught_mistakes"} <= set(metrics)
    assert {"warm-up", "PRM", "ORM", "GRPO"} == set(metrics["seconds"])
    assert len(metrics["reward_models"]) == 6  # both, on mistakes made up and on both policies
    assert metrics["last_updates"]["rewards/prm/steps"] >= 1
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("prm", "orm", "policy", "warmed_up"):
        assert (tmp_path / folder / "model.safetensors").exists()
