"""The quickstart: its judges to the letter, its files from a short run. `.ci/run` holds it to its promise."""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import quickstart
from running_sums import task
from running_sums.policy import until_eos
from running_sums.task import TOKENIZER
from running_sums.training import SumsArguments, problems_for

from tests.support.printed import unexpected_lines
from trl_grpo_ext import StepRewards
from trl_grpo_ext.report import main as write_report


ROOT = Path(__file__).parents[2]

PROBLEM = "3+4-2="
# One token per character, and the end of sequence
RIGHT = "3+4=7;7-2=5;#5<eos>"


def ids_of(completion: str) -> list[int]:
    ids = TOKENIZER(completion)["input_ids"]
    assert TOKENIZER.unk_token_id is None
    return ids


def steps_of(completion: str) -> StepRewards:
    (judged,) = quickstart.judge_steps(prompts=[PROBLEM], completion_ids=[ids_of(completion)])
    return judged


def answer_of(completion: str, problem: str = PROBLEM) -> float:
    (judged,) = quickstart.judge_answer(prompts=[problem], completion_ids=[ids_of(completion)])
    return judged


@pytest.mark.parametrize(
    ("completion", "ends", "values"),
    [
        pytest.param(RIGHT, [5, 11], [1, 1], id="right"),
        pytest.param("3+4=8;8-2=6;#6<eos>", [5, 11], [0, 1], id="wrong sum, then right from there"),
        pytest.param("3+4=7;8-2=6;#6<eos>", [5, 11], [1, 0], id="does not take the value stated before"),
        pytest.param("3+4=7;7-3=4;#4<eos>", [5, 11], [1, 0], id="not the problem's term"),
        pytest.param("3+4=7;7+2=9;#9<eos>", [5, 11], [1, 0], id="not the problem's operation"),
        pytest.param("7-2=5;3+4=7;#7<eos>", [5, 11], [0, 0], id="wrong order"),
        pytest.param("3+4=1;1-2=-1;#-1<eos>", [5, 12], [0, 1], id="negative value"),
        pytest.param("3+4=07;7-2=5;#5<eos>", [6, 12], [0, 0], id="leading zero"),
        pytest.param("3+4=7;7-2=5;<eos>", [5, 11], [1, 1], id="missing answer"),
        pytest.param("3+4=7;#7<eos>", [5], [1], id="missing step"),
        pytest.param("3+4=7;7-2=5;5+1=6;#6<eos>", [5, 11, 17], [1, 1, 0], id="extra step"),
        pytest.param("3+4=7;7-2=5;7-2=5;#5<eos>", [5, 11, 17], [1, 1, 0], id="repeated step"),
        pytest.param("3+4=7;;7-2=5;#5<eos>", [5, 6, 12], [1, 0, 0], id="empty step, which states no value"),
        pytest.param("#5;7-2=5;<eos>", [2, 8], [0, 0], id="answer first"),
        pytest.param("=-=+<eos>", [4], [0], id="garbage"),
        pytest.param("3+4=7;7-2", [5, 8], [1, 0], id="truncated in a step"),
        pytest.param("3+4=7;7-2=5", [5, 10], [1, 0], id="truncated before the step's end"),
        pytest.param("3+4=7;", [5], [1], id="truncated after a step"),
        pytest.param("3+4=7;7-2=5;#", [5, 11], [1, 1], id="truncated in the answer"),
        pytest.param("3+4=7;<pad>7-2=5;#5<eos>", [5, 12], [1, 0], id="special token in a step"),
        pytest.param("#5<eos>", [2], [0], id="no step: judged, as wrong"),
        pytest.param("<eos>", [0], [0], id="nothing"),
    ],
)
def test_judge_steps(completion, ends, values):
    judged = steps_of(completion)
    assert (judged.ends, judged.values) == (ends, values)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        pytest.param(RIGHT, 1, id="right"),
        pytest.param("3+4=8;8-3=5;#5<eos>", 1, id="right by luck: the steps are the other source's"),
        pytest.param("#5<eos>", 1, id="without working"),
        pytest.param("3+4=7;7-2=5;#6<eos>", 0, id="wrong"),
        pytest.param("3+4=7;7-2=5;5<eos>", 0, id="not marked as the answer"),
        pytest.param("3+4=7;7-2=5;#5;<eos>", 0, id="not at the end"),
        pytest.param("3+4=7;7-2=5;#05<eos>", 0, id="leading zero"),
        pytest.param("3+4=7;7-2=5;#6#5<eos>", 0, id="two answers"),
        pytest.param("3+4=7;7-2=5;<eos>", 0, id="missing"),
        pytest.param("3+4=7;7-2=5;#5", 0, id="truncated"),
        pytest.param("<eos>", 0, id="nothing"),
    ],
)
def test_judge_answer(completion, right):
    assert answer_of(completion) == right


def judged_by_hand(problem: str, tokens: list[str]) -> dict[int, float]:
    """The reward at each step's last token, read from a text in which every token is one character."""
    text = "".join(token if len(token) == 1 else token[1] for token in tokens)
    stated, *terms = re.findall(r"[+-]?\d+", problem)
    rewards: dict[int, float] = {}
    for index, step in enumerate(re.finditer(r"[^;]*;", text)):
        equation = re.fullmatch(r"(-?\d+)([+-]\d+)=(-?\d+);", step[0])
        expected = equation and (stated, *terms[index : index + 1], str(int(equation[1]) + int(equation[2])))
        rewards[step.end() - 1] = float(equation is not None and equation.groups() == expected)
        ending = re.search(r"=(-?\d+);$", step[0])
        stated = ending and ending[1]
    tail = text.rpartition(";")[2]
    if not re.fullmatch("([#e].*)?", tail) or not rewards:
        rewards[len(text) - 1] = 0.0
    return rewards


def random_completion(problem: str, rng: random.Random) -> list[str]:
    """Tokens of a worked solution with a few of them replaced, left out or put in, and perhaps cut off."""
    tokens = [*task.worked_solution(problem), task.EOS]
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        position = rng.randrange(len(tokens))
        token = rng.choice([*"0123456789+-=#;", *"##;;==", "<pad>", "<bos>", task.EOS])
        tokens[position : position + rng.randint(0, 1)] = rng.choice([[], [token]])
    return tokens[: rng.choice([len(tokens), len(tokens), rng.randint(1, 30)])]


def test_judges_agree_with_reading_by_hand():
    rng = random.Random(0)
    found = set()
    for _ in range(20000):
        problem = task.make_problem(rng)
        tokens = random_completion(problem, rng)
        if not tokens:
            continue
        ids = [TOKENIZER.convert_tokens_to_ids(tokens)]
        (judged,) = quickstart.judge_steps([problem], ids)
        assert dict(zip(judged.ends, judged.values, strict=True)) == judged_by_hand(problem, tokens), tokens
        right = re.search(r"(^|;)#(\d+)<eos>$", "".join(tokens))
        expected = float(right is not None and right[2] == str(eval(problem[:-1])))
        assert quickstart.judge_answer([problem], ids) == [expected], tokens
        found.add((sum(judged.values), expected))
    # All numbers of right steps, with right and wrong answers
    assert found >= {(number, answer) for number in range(5) for answer in (0.0, 1.0)}


def test_worked_solutions_are_judged_right_and_fit():
    rng = random.Random(0)
    for problem in (task.make_problem(rng) for _ in range(2000)):
        ids = ids_of(task.worked_solution(problem) + "<eos>")
        assert len(ids) <= task.MAX_COMPLETION_LENGTH
        assert quickstart.judge_answer([problem], [ids]) == [1.0]
        (judged,) = quickstart.judge_steps([problem], [ids])
        assert list(judged.values) == [1.0] * task.NUM_OPERATIONS


def test_problems_are_in_one_set_only():
    problems = problems_for(SumsArguments(warmup_steps=20, max_steps=5))
    everything = [problem for part in problems for problem in part]
    assert len(set(everything)) == len(everything) == 512 + 256 + 20 * 64 + 5 * 16


def test_tokenizer_gives_one_token_per_character():
    problem = "12+7-19="
    assert TOKENIZER.convert_ids_to_tokens(ids_of(problem)) == list(problem)
    assert TOKENIZER.decode(ids_of(RIGHT), skip_special_tokens=True) == "3+4=7;7-2=5;#5"


def test_completion_is_cut_after_its_first_end_of_sequence():
    eos, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    assert until_eos([5, 6, eos, pad, pad]) == [5, 6, eos]
    assert until_eos([5, 6, 7]) == [5, 6, 7]


def test_it_is_short_enough_to_be_read_at_once():
    assert len(Path(quickstart.__file__).read_text().splitlines()) <= 150


def run_quickstart(python: str, output_dir: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> dict:
    command = [python, *launcher, "recipes/quickstart.py", "--output_dir", str(output_dir), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert unexpected_lines(run.stderr) == []
    return json.loads((output_dir / "metrics.json").read_text())


SHORT = "--max_steps 2 --num_prompts 2 --num_generations 4 --num_held_out 16 --warmup_steps 2".split()


def check_files(output_dir: Path, metrics: dict) -> None:
    assert (output_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("warmed_up", "policy"):
        names = {path.name for path in (output_dir / folder).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert metrics["seconds"] > 0
    assert {"accuracy_before", "accuracy_after", "right_steps_before", "right_steps_after"} <= set(metrics)
    assert metrics["arguments"]["max_steps"] == 2
    assert {"trl_grpo_ext", "trl", "torch"} <= set(metrics["versions"])


def test_short_run_writes_its_files_and_the_report_of_its_credit(forked_python, tmp_path):
    metrics = run_quickstart(forked_python, tmp_path, *SHORT, "--log_credit", "2")
    assert metrics["processes"] == 1
    check_files(tmp_path, metrics)
    write_report([str(tmp_path)])
    page = (tmp_path / "credit.html").read_text(encoding="utf-8")
    assert "judge_steps" in page and "Curves are the trainer" in page


@pytest.mark.distributed
def test_short_run_on_two_processes(forked_python, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    metrics = run_quickstart(forked_python, tmp_path, *SHORT, launcher=launcher)
    assert metrics["processes"] == 2
    check_files(tmp_path, metrics)
