"""The evidence: each experiment from beginning to end in a tiny size, its formulas, and the committed rows."""

import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from evidence import all as everything
from evidence import figures, gaming, kl_budget, kl_estimators, reward_orders, runs, supervision
from running_sums.policy import build_policy
from running_sums.task import TOKENIZER
from transformers import AutoTokenizer
from trl import TrlParser

from tests.support.tiny_models import save_tiny_model
from trl_grpo_ext.kl.estimates import kl_estimate, weight_by_ratio
from trl_grpo_ext.loss import importance_ratio


FOLDER = Path(runs.__file__).parent
README = FOLDER / "README.md"
EXPERIMENTS = {
    "supervision": (supervision.ARMS, ["accuracy", "right_steps"], supervision.OUTCOME),
    "gaming": (gaming.ARMS, ["accuracy", "steps", "clipped_ratio"], gaming.ALONE),
    "kl_budget": (kl_budget.ARMS, ["accuracy", "right_steps", "kl"], kl_budget.NO_KL),
    "reward_orders": (reward_orders.ARMS, ["accuracy", "right_steps"], reward_orders.BASE),
}
TINY = {
    "max_steps": 2,
    "num_prompts": 1,
    "num_generations": 2,
    "num_held_out": 4,
    "warmup_steps": 1,
    "evaluation_steps": 1,
}


def texts_of(svg: str) -> list[str]:
    """The texts of a figure, in the order in which they are drawn."""
    return re.findall(r">([^<>\n]+)</text>", svg)


# One process makes the runs, which others read
pytestmark = pytest.mark.xdist_group("evidence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


# ---------------------------------------------------------------------------------------------------------------------
# Tiny runs


@pytest.mark.parametrize(
    ("script", "name", "seeds"),
    [(gaming, "gaming", [0]), (kl_budget, "kl_budget", [0]), (reward_orders, "reward_orders", [0, 1])],
)
def test_an_experiment_runs_each_arm_with_each_seed_once(script, name, seeds, folder, monkeypatch):
    # Those with the most settings, to save time
    arms = dict(list(EXPERIMENTS[name][0].items())[-2:])
    monkeypatch.setattr(script, "ARMS", arms)
    monkeypatch.setattr(script, "ALONE", next(iter(arms)), raising=False)
    monkeypatch.setattr(script, "NO_KL", next(iter(arms)), raising=False)
    monkeypatch.setattr(script, "BASE", next(iter(arms)), raising=False)
    arguments = gaming.GamingArguments if script is gaming else runs.EvidenceArguments
    args = arguments(output_dir=str(folder / "outputs"), results=str(folder), seeds=seeds, **TINY)
    script.main(args)
    rows = runs.read(folder / f"{name}.csv")
    assert {(row["arm"], row["seed"], row["update"]) for row in rows} == {
        (arm, str(seed), update) for arm in arms for seed in seeds for update in "012"
    }
    assert len(rows) == len(arms) * len(seeds) * 3
    starts = {(row["seed"], row["accuracy"]) for row in rows if row["update"] == "0"}
    assert len(starts) == len(seeds)
    texts = texts_of((folder / f"{name}.svg").read_text())
    drawn = "\n".join(texts)
    assert all(arm in drawn for arm in arms) and f"{len(seeds)} seeds" in drawn
    # All rows are there: nothing is trained, and the figure is the same
    monkeypatch.setattr(runs, "run", None)
    before = (folder / f"{name}.svg").read_bytes()
    script.main(args)
    assert runs.read(folder / f"{name}.csv") == rows
    assert (folder / f"{name}.svg").read_bytes() == before


def test_supervision_uses_the_best_rate_of_the_grid(folder, monkeypatch):
    monkeypatch.setattr(supervision, "RATES", (1e-4, 2e-4))
    kept = ("outcome: answer", "position, all; clip")
    monkeypatch.setattr(supervision, "ARMS", {arm: supervision.ARMS[arm] for arm in kept})
    seeds = {"seeds": [0], "grid_seeds": [1]}
    args = runs.EvidenceArguments(output_dir=str(folder / "outputs"), results=str(folder), **seeds, **TINY)
    supervision.main(args)
    grid = runs.read(folder / "supervision_grid.csv")
    assert len(grid) == 2 * 2 * 3 and {row["seed"] for row in grid} == {"1"}
    rates = supervision.best_rates(grid)
    rows = runs.read(folder / "supervision.csv")
    assert {(row["arm"], float(row["learning_rate"])) for row in rows} == set(rates.items())
    assert len(rows) == 2 * 3


def test_the_best_rate_is_that_of_the_last_update_in_the_mean_of_the_seeds():
    found = {("0.1", 0): (0.9, 0.9), ("0.1", 5): (0.1, 0.5), ("0.2", 5): (0.2, 0.45), ("0.3", 5): (0.6, 0.0)}
    rows = [
        {"arm": "one", "learning_rate": rate, "seed": str(seed), "update": str(update), "accuracy": str(accuracy)}
        for (rate, update), accuracies in found.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    assert supervision.best_rates(rows) == {"one": 0.2}


def test_the_first_seed_of_the_gaming_leaves_a_report(folder):
    # Made by the run above
    runs_of_arms = sorted((folder / "outputs").glob("gaming_*"))
    assert len(runs_of_arms) == 2
    for run in runs_of_arms:
        assert len(list((run / "credit").glob("train_*.parquet"))) == 2
        assert (run / "trainer_state.json").exists()


def test_all_experiments_take_the_same_options(monkeypatch):
    called = []
    for script in (supervision, gaming, kl_budget, reward_orders, kl_estimators):
        monkeypatch.setattr(script, "main", called.append)
    (args,) = TrlParser(everything.AllArguments).parse_args_and_config(
        ["--seeds", "7", "8", "--max_steps", "3", "--results", "there", "--model_name_or_path", "model"]
    )
    everything.main(args)
    assert [(one.seeds, one.max_steps, one.results) for one in called] == [([7, 8], 3, "there")] * 5
    assert called[-1].model_name_or_path == "model"


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize(
    ("completion", "values"),
    [
        ("3+4=7;7-2=5;#5<eos>", [0.9, 0.9]),
        ("1+1=2;1+1=2;1+1=3;", [0.9, 0.9, 0.1]),
        ("3+4=7;;7-2", [0.9, 0.1, 0.1]),
        ("<eos>", [0.1]),
    ],
)
def test_the_reward_model_that_can_be_gamed_never_looks_at_the_problem(completion, values):
    ids = TOKENIZER(completion)["input_ids"]
    (judged,) = gaming.judge_equations(completion_ids=[ids])
    assert list(judged.values) == values


def test_the_measured_kl_is_that_of_the_tokens_written(monkeypatch):
    torch.manual_seed(0)
    policy = build_policy()
    reference = build_policy()
    problems = ["3+4-2=", "11+4-2="]
    completions = [[5, 6, 7, 2], [8, 2]]
    monkeypatch.setattr(kl_budget, "complete", lambda *arguments, **options: completions)
    expected = []
    for problem, completion in zip(problems, completions, strict=True):
        prompt = TOKENIZER(problem)["input_ids"]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in (policy, reference)]
        p, q = (torch.distributions.Categorical(logits=one) for one in logits)
        expected += torch.distributions.kl_divergence(p, q).tolist()
    assert kl_budget.mean_kl(policy, reference, problems) == pytest.approx(mean(expected), rel=1e-4)


def test_a_table_has_means_deviations_and_differences_of_the_same_seed():
    values = {"base": (0.1, 0.3), "other": (0.4, 0.2)}
    rows = [
        {"arm": arm, "learning_rate": "0.1", "seed": str(seed), "update": "3", "accuracy": str(value)}
        for arm, own in values.items()
        for seed, value in enumerate(own)
    ]
    head, base, other = figures.table_of_arms(rows, ["accuracy"], "base")
    assert other[3] == f"0.300 ± {stdev((0.4, 0.2)):.3f}"
    assert other[4] == f"+0.100 ± {stdev((0.3, -0.1)):.3f}" and other[5] == "1/2"


# ---------------------------------------------------------------------------------------------------------------------
# The KL estimates


def random_states(seed: int = 0, tokens: int = 9) -> kl_estimators.States:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, tokens, generator=generator, dtype=torch.float64)
    head = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    return kl_estimators.States(*logits.log_softmax(-1), head)


@pytest.mark.parametrize("key", kl_estimators.ESTIMATES, ids=" ".join)
@pytest.mark.parametrize("sampler", ["policy", "before"])
def test_the_moments_are_those_of_the_loss_of_the_package(key, sampler):
    states = random_states()
    name, ratio = key
    drawn_from = getattr(states, sampler)
    # The loss of every token at every state, differentiated one by one through the LM head
    hidden = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    logp = (states.policy + hidden @ states.head.T).log_softmax(-1)
    values = kl_estimate(logp, states.reference, name)
    if ratio == "yes":
        weight = importance_ratio(logp, drawn_from, torch.ones_like(logp), "token")
        values = weight_by_ratio(values, weight, name)
    gradients = torch.stack([torch.autograd.grad(v.sum(), hidden, retain_graph=True)[0] for v in values.unbind(1)], 1)
    chances = drawn_from.exp()
    value_mean = (chances * values).sum(1)
    gradient_mean = (chances[..., None] * gradients).sum(1)
    found = kl_estimators.moments(kl_estimators.ESTIMATES[key], states, drawn_from)
    torch.testing.assert_close(found.value_mean, value_mean)
    torch.testing.assert_close(found.value_variance, (chances * (values - value_mean[:, None]) ** 2).sum(1))
    torch.testing.assert_close(found.gradient_mean, gradient_mean)
    distances = ((gradients - gradient_mean[:, None]) ** 2).sum(-1)
    torch.testing.assert_close(found.gradient_variance, (chances * distances).sum(1))


def test_the_gradient_of_the_exact_kl_is_its_derivative():
    states = random_states()
    hidden = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    logp = (states.policy + hidden @ states.head.T).log_softmax(-1)
    kl = torch.nn.functional.kl_div(states.reference, logp, log_target=True, reduction="sum")
    (gradient,) = torch.autograd.grad(kl, hidden)
    torch.testing.assert_close(kl_estimators.exact_gradient(states), gradient)


def test_the_kl_estimators_run_with_a_small_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}\n"
    tokenizer.save_pretrained(folder)
    args = kl_estimators.KLArguments(
        model_name_or_path=folder,
        results=str(tmp_path),
        seeds=[0, 1],
        max_steps=2,
        num_prompts=3,
        completion_length=5,
        learning_rate=3e-3,
    )
    kl_estimators.main(args)
    rows = runs.read(tmp_path / "kl_estimators.csv")
    assert len(rows) == 2 * (2 * len(kl_estimators.ESTIMATES) + 1)
    assert {row["states"] for row in rows} == {"15"}
    check_estimates(rows, within=3)


def check_estimates(rows: list[dict[str, str]], within: float) -> None:
    """What is known on paper; drawn tokens are as far from the sums as these predict, within a factor."""
    for row in rows:
        key = (row["sampled"], row["estimate"], row["ratio"])
        assert float(row["kl"]) > 0
        if key in (("on policy", "k1", "no"), ("on policy", "k3", "no"), ("any", "exact", "no")):
            assert abs(float(row["value_bias"])) < 1e-4
        if row["ratio"] == "yes" or key == ("on policy", "k2", "no") or row["estimate"] == "exact":
            assert float(row["gradient_bias"]) < 1e-4
        if key == ("on policy", "k1", "no"):
            assert float(row["gradient_bias"]) == pytest.approx(1)
        # The variance of k3 without the ratio lies in tokens too rare to be drawn
        if row["estimate"] != "exact" and key[1:] != ("k3", "no"):
            assert 1 / within < float(row["drawn_gradient_distance"]) < within


# ---------------------------------------------------------------------------------------------------------------------
# What is committed


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_rows_are_complete_and_the_readme_says_what_they_hold(name):
    arms, columns, base = EXPERIMENTS[name]
    rows = runs.read(FOLDER / f"{name}.csv")
    last = figures.last_updates(rows)
    assert [(row["arm"], row["seed"]) for row in last] == [(arm, str(seed)) for seed in range(5) for arm in arms]
    readme = README.read_text(encoding="utf-8")
    for line in figures.table_of_arms(rows, columns, base):
        assert f"| {' | '.join(line)} |" in readme


def test_the_committed_estimates_hold_and_the_readme_says_so():
    rows = runs.read(FOLDER / "kl_estimators.csv")
    assert {row["seed"] for row in rows} == set("01234")
    check_estimates(rows, within=1.3)
    readme = README.read_text(encoding="utf-8")
    for line in kl_estimators.table(rows):
        assert f"| {' | '.join(line)} |" in readme


def test_the_committed_rates_are_the_best_of_the_grid_on_other_seeds():
    grid = runs.read(FOLDER / "supervision_grid.csv")
    rows = runs.read(FOLDER / "supervision.csv")
    assert {(row["arm"], float(row["learning_rate"])) for row in rows} == set(supervision.best_rates(grid).items())
    assert not {row["seed"] for row in grid} & {row["seed"] for row in rows}


@pytest.mark.parametrize("script", [supervision, gaming, kl_budget, reward_orders, kl_estimators])
def test_the_committed_figure_shows_the_committed_rows(script, tmp_path):
    name = script.__name__.split(".")[-1]
    figures.save_figure(script.figure(runs.read(FOLDER / f"{name}.csv")), tmp_path / "figure.svg")
    assert texts_of((tmp_path / "figure.svg").read_text()) == texts_of((FOLDER / f"{name}.svg").read_text())
