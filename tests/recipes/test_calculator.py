"""The calculator in two turns: TRL's loop calls the tool, rewards land on the call, and a short training runs."""

import copy
from pathlib import Path
from statistics import mean, stdev

import calculator as recipe
import pytest
import torch
from calculator import CalculatorArguments
from trl.chat_template_utils import parse_response
from two_turns import task
from two_turns.plot import figure, read
from two_turns.policy import build_policy, converse, supervised_loss
from two_turns.task import TOKENIZER, calculator, question, worked_solution


ROOT = Path(__file__).parents[2]
COMPARISON = ROOT / "recipes" / "two_turns" / "comparison.csv"

PROBLEM = "a=7,b=3,c=5,d=4:b*c+a"
RIGHT = "<call>calculator(expression=3*5+7)<eos>"


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def completion_of(first: str, answer: str | None = None) -> list[dict]:
    """Messages of a completion, as TRL makes them."""
    said = parse_response(TOKENIZER, ids_of(first), prefix=ids_of("<assistant>"), tools=[calculator])
    if answer is None:
        return [said]
    return [said, {"role": "tool", "name": "calculator", "content": "22"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("first", "answer", "rewards"),
    [
        pytest.param(RIGHT, "4", (1, 1), id="right"),
        pytest.param(RIGHT, "5", (1, 0), id="right call, wrong answer"),
        pytest.param("<call>calculator(expression=3*5+4)<eos>", "4", (0, 1), id="wrong call, lucky answer"),
        pytest.param("<call>calculator(expression=5*3+7)<eos>", "4", (0, 1), id="another order"),
        pytest.param("<call>calculator(3*5+7)<eos>", "4", (0, 1), id="no name of the argument"),
        pytest.param(RIGHT.replace("<eos>", RIGHT), "4", (0, 1), id="two calls"),
        pytest.param("4<eos>", None, (0, 1), id="no call, lucky answer"),
        pytest.param(RIGHT, None, (1, 0), id="no answer"),
        pytest.param("<eos>", None, (0, 0), id="nothing"),
    ],
)
def test_judges(first, answer, rewards):
    completion = completion_of(first, answer)
    columns = {"problem": [PROBLEM], "completions": [completion]}
    (call,) = recipe.judge_call(**columns)
    assert recipe.judge_answer(**columns) == [rewards[1]]
    assert list(call.values) == [rewards[0]] + [None] * (answer is not None)


def test_worked_solutions_are_right_and_fit():
    problems = task.split_problems(0, held_out=500, validation=0, warm_up=0, grpo=0).held_out
    for problem in problems:
        messages = worked_solution(problem)
        assert task.is_right_call(problem, messages[1:])
        assert task.is_right_answer(problem, messages[1:])
        prompt = TOKENIZER.apply_chat_template(
            messages[:1], tools=[calculator], add_generation_prompt=True, return_dict=False
        )
        ids = TOKENIZER.apply_chat_template(messages, tools=[calculator], return_dict=False)
        assert ids[: len(prompt)] == prompt
        assert len(ids) - len(prompt) <= task.MAX_COMPLETION_LENGTH
        assert TOKENIZER.unk_token_id not in ids


@pytest.mark.parametrize(("expression", "value"), [("3*5+7", "22"), ("3+5*7", "38"), ("9*9*9", "729"), ("1+2+3", "6")])
def test_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize("expression", ["", "3+", "3-5", "__import__"])
def test_calculator_refuses_what_is_no_expression(expression):
    with pytest.raises(ValueError, match="malformed"):
        calculator(expression)


@pytest.fixture(scope="module")
def policy():
    """A policy that has learned one problem by heart."""
    torch.manual_seed(0)
    model = build_policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        supervised_loss(model, [PROBLEM]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    """A trainer after an update on the problem that its policy knows, with what it has seen."""
    args = CalculatorArguments(
        output_dir=str(tmp_path_factory.mktemp("calculator")), max_steps=1, num_prompts=1, num_generations=4
    )
    trainer = recipe.make_trainer(args, "turns, by step", copy.deepcopy(policy), [PROBLEM])
    seen = {}

    def recorded(method, name):
        def call(*arguments):
            seen[f"{name} from"] = arguments
            seen[name] = method(*arguments)
            return seen[name]

        return call

    trainer._generate = recorded(trainer._generate, "generated")
    trainer.compute_advantages = recorded(trainer.compute_advantages, "advantages")
    trainer.train()
    return trainer, seen


def test_the_loop_of_trl_calls_the_tool(trained):
    trainer, seen = trained
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] == 1.0
    assert logged["tools/failure_frequency"] == 0.0
    _, completion_ids, tool_mask, completions, *_ = seen["generated"]
    for ids, mask, messages in zip(completion_ids, tool_mask, completions, strict=True):
        assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
        (call,) = messages[0]["tool_calls"]
        assert messages[1]["content"] == calculator(**call["function"]["arguments"])
        written = TOKENIZER.convert_ids_to_tokens([one for one, own in zip(ids, mask, strict=True) if own])
        said = TOKENIZER.convert_ids_to_tokens([one for one, own in zip(ids, mask, strict=True) if not own])
        assert said == ["<tool>", *messages[1]["content"], "<assistant>"]
        assert written.count("<eos>") == 2


def test_rewards_lie_on_the_ends_of_the_turns(trained):
    _, seen = trained
    (batch,) = seen["advantages from"]
    ids = [torch.tensor(one) for one in seen["generated"][1]]
    call_source, answer_source = (~batch.rewards_KNT.isnan()).unbind(0)
    for row, one in enumerate(ids):
        first_end, last_end = (one == TOKENIZER.eos_token_id).nonzero().flatten().tolist()
        assert call_source[row].nonzero().flatten().tolist() == [first_end]
        assert answer_source[row].nonzero().flatten().tolist() == [last_end]


def test_the_evaluation_and_the_loop_of_trl_write_the_same(policy, tmp_path):
    problems = task.split_problems(1, held_out=8, validation=0, warm_up=0, grpo=0).held_out
    args = CalculatorArguments(output_dir=str(tmp_path), num_prompts=8, num_generations=2)
    trainer = recipe.make_trainer(args, "answer only", copy.deepcopy(policy), problems)
    # The likeliest token always, as in the evaluation
    trainer.generation_config.top_k = 1
    trainer.model.eval()
    generated = []
    generate = trainer._generate
    trainer._generate = lambda prompts: generated.append(generate(prompts)) or generated[-1]
    problems = [PROBLEM, *problems]
    trainer._generate_and_score_completions(
        [{"prompt": question(problem), "problem": problem} for problem in problems for _ in range(2)]
    )
    (_, _, _, completions, *_), *_ = generated
    assert completions[::2] == completions[1::2] == converse(policy, problems)


def test_a_short_run_writes_a_row_for_each_evaluation(policy, tmp_path):
    args = CalculatorArguments(
        output_dir=str(tmp_path), max_steps=2, num_prompts=2, num_generations=2, num_held_out=4, evaluation_steps=1
    )
    problems = task.split_problems(0, held_out=4, validation=0, warm_up=0, grpo=4)
    rows = recipe.run(args, "sum per completion", policy, problems, learning_rate=1e-4)
    recipe.append(tmp_path / "rows.csv", rows)
    recipe.append(tmp_path / "rows.csv", rows)
    written = read(tmp_path / "rows.csv")
    assert [int(row["update"]) for row in written] == [0, 1, 2, 0, 1, 2]
    assert [int(row["tokens"]) for row in written[:3]] == [row["tokens"] for row in rows]
    assert 0 == rows[0]["tokens"] < rows[1]["tokens"] < rows[2]["tokens"]
    for row in rows:
        assert row["accuracy"] == pytest.approx(row["right_calls"] - row["wasted_calls"] + row["lucky_answers"])


def table() -> dict[str, list[dict[str, str]]]:
    """Rows of the comparison after the last update, by method."""
    rows = read(COMPARISON)
    last = max(int(row["update"]) for row in rows)
    found = {}
    for row in rows:
        if int(row["update"]) == last:
            found.setdefault(row["method"], []).append(row)
    return found


def test_the_committed_rows_are_complete():
    found = table()
    assert set(found) <= set(recipe.METHODS)
    for rows in found.values():
        assert [int(row["seed"]) for row in rows] == list(range(5))
        assert {float(row["learning_rate"]) for row in rows} == {recipe.METHODS[rows[0]["method"]]["learning_rate"]}
    # The same budget: completions are the same in number, and differ in length by a few tokens in a thousand
    tokens = [mean(int(row["tokens"]) for row in rows) for rows in found.values()]
    assert max(tokens) < 1.02 * min(tokens)


def test_the_learning_rates_are_the_best_of_the_grid():
    rows = read(COMPARISON.with_name("grid.csv"))
    last = max(int(row["update"]) for row in rows)
    for method, compared in table().items():
        own = {}
        for row in rows:
            if row["method"] == method and int(row["update"]) == last:
                own.setdefault(row["learning_rate"], []).append(float(row["accuracy"]))
        assert len(own) == 3
        assert mean(own[compared[0]["learning_rate"]]) == max(map(mean, own.values()))
    assert not {row["seed"] for row in rows} & {row["seed"] for row in read(COMPARISON)}


def test_the_readme_says_what_the_rows_hold():
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for method, rows in table().items():
        accuracies = [100 * float(row["accuracy"]) for row in rows]
        assert f"{method} {mean(accuracies):.1f} ± {stdev(accuracies):.1f} %" in readme


def test_the_figure_shows_every_method():
    drawn = figure(read(COMPARISON))
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert [text.split(" (")[0] for text in labels] == list(table())
