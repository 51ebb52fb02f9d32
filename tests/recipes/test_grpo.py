"""recipes/grpo.py and its reward sources: configuration, data, rewards by name, steps on tokens, and one whole run."""

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path

import equation_steps
import grpo
import pytest
import reasoning_gym_task
import trl.rewards
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import smollm2
from tests.support.printed import unexpected_lines
from tests.support.tiny_models import save_tiny_model
from trl_grpo_ext import StepRewards


RECIPES = Path(__file__).parents[2] / "recipes"


CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
SMOLLM2_CONFIG = RECIPES / "configs" / "smollm2_chain_sum.yaml"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, but one for "3" and a newline, and one for a newline and "5"; `<end>` closes turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "3Ċ", "Ċ5"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("3", "Ċ"), ("Ċ", "5")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    reason = smollm2.missing_packages()
    if reason is not None:
        pytest.skip(reason)
    return smollm2.load_tokenizer()


def parse(*arguments: str):
    return grpo.make_parser().parse_args_and_config(list(arguments))


def script_arguments(dataset: object, **fields) -> grpo.ScriptArguments:
    return grpo.ScriptArguments(dataset=str(dataset), reward_funcs=["a.b"], **fields)


# --- Configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_its_rewards_load(path):
    script_args, training_args, _ = parse("--config", str(path), "--bf16", "false")
    sources = grpo.load_rewards(script_args.reward_funcs, training_args.reward_weights)
    assert len(sources) == len(script_args.reward_funcs)


def test_commands_of_the_readme_parse(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    text = (RECIPES / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:python|accelerate launch [^`\n]*) recipes/grpo\.py (?!--help)([^`\n]+)", text)
    assert len(commands) >= 6
    for command in commands:
        # bfloat16, TRL's default, is refused where there is no GPU, as the command for a larger model would be
        parse(*shlex.split(command), "--bf16", "false")


def test_unknown_key_of_a_config_fails(tmp_path):
    config = tmp_path / "misspelt.yaml"
    config.write_text(SMOLLM2_CONFIG.read_text() + "\nkl_estimater: exact\n")
    with pytest.raises(ValueError, match="kl_estimater"):
        parse("--config", str(config))


def test_command_line_wins_over_the_config():
    options = '{"min_terms": 2, "size": 5}'
    overrides = ("--gamma", "0.5", "0.9", "--kl_estimator", "k2", "--dataset_options", options, "--lora_r", "4")
    script_args, training_args, model_args = parse("--config", str(SMOLLM2_CONFIG), *overrides)
    assert script_args.dataset_options == {"min_terms": 2, "size": 5}
    assert training_args.gamma == [0.5, 0.9]
    assert training_args.kl_estimator == "k2"
    assert training_args.supervision == "process"
    assert model_args.lora_r == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dataset_options": "{size: 3}"}, "dataset_options is not valid JSON"),
        ({"dataset_options": "[3]"}, "dataset_options must be a dict"),
        ({"examples": [["question only"]]}, "pairs"),
        ({"eval_split": "test", "eval_size": 3}, "not both"),
    ],
)
def test_bad_script_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        script_arguments("x", **fields)


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{a} + 1 =", "answer": str(a + 1)} for a in (1, 2, 3, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_file_with_system_prompt_and_examples(questions):
    args = script_arguments(questions, prompt_column="question", system_prompt="Add.", examples=[["0 + 1 =", "1"]])
    train, held_out = grpo.load_data(args)
    assert held_out is None
    assert sorted(train.column_names) == ["answer", "prompt"]
    assert train[1]["prompt"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0 + 1 ="},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2 + 1 ="},
    ]


def test_string_prompts_stay_text_without_a_system_prompt(questions):
    train, _ = grpo.load_data(script_arguments(questions, prompt_column="question", train_split="train[1:3]"))
    assert train["prompt"][:] == ["2 + 1 =", "3 + 1 ="]


def test_held_out_prompts_are_never_trained_on(questions):
    train, held_out = grpo.load_data(script_arguments(questions, prompt_column="question", eval_size=1))
    assert held_out["prompt"][:] == ["1 + 1 ="]
    assert train["prompt"][:] == ["2 + 1 =", "3 + 1 ="]


def test_missing_prompt_column_names_the_columns(questions):
    with pytest.raises(ValueError, match="no column 'prompt'.*question, answer"):
        grpo.load_data(script_arguments(questions))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        grpo.load_data(script_arguments("nowhere.jsonl"))


def test_second_system_message_is_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}))
    with pytest.raises(ValueError, match="system message already"):
        grpo.load_data(script_arguments(path, system_prompt="c"))


def test_hub_id_split_and_options_reach_load_dataset(monkeypatch):
    calls = []
    monkeypatch.setattr(grpo, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)))
    grpo.load_split(script_arguments("openai/gsm8k", dataset_options={"name": "main"}), "train[:10]")
    assert calls == [(("openai/gsm8k",), {"split": "train[:10]", "name": "main"})]


def test_reasoning_gym_task_becomes_prompts_with_their_entries():
    args = script_arguments("reasoning_gym:chain_sum", dataset_options={"size": 6, "max_terms": 3}, eval_size=2)
    train, held_out = grpo.load_data(args)
    assert len(held_out) == 2
    entry = json.loads(train[0]["entry"])
    assert train[0]["prompt"] == [{"role": "user", "content": entry["question"]}]
    assert entry["answer"] == train[0]["answer"]
    assert grpo.load_data(args)[0].to_list() == train.to_list(), "two processes would train on different problems"


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("chainsum", {}, "no task 'chainsum'.*chain_sum"),
        ("chain_sum", {"terms": 3}, "no terms.*min_terms"),
        ("chain_sum", {"min_terms": 0}, "min_terms must be positive"),
        ("rearc", {"size": 1}, "change when stored as JSON"),
    ],
)
def test_bad_reasoning_gym_task(task, options, message):
    with pytest.raises(ValueError, match=message):
        grpo.load_data(script_arguments(f"reasoning_gym:{task}", dataset_options=options))


# --- Reward sources by name ------------------------------------------------------------------------------------------


@pytest.fixture
def reward_file(tmp_path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from trl_grpo_ext import StepRewards\n"
        "LIMIT = 3\n"
        "def lower(completion_ids, **kwargs):\n"
        "    return [StepRewards([0, len(ids) - 1], [0.0, sum(ids) % 7]) if len(ids) > 1 else None\n"
        "            for ids in completion_ids]\n"
    )
    return path


def test_reward_functions_and_models_by_name(reward_file, tmp_path):
    load = grpo.load_reward
    assert load("reasoning_gym_task:task_score") is reasoning_gym_task.task_score
    assert load("reasoning_gym_task.task_score") is reasoning_gym_task.task_score
    assert load(f"{reward_file}:lower").__name__ == "lower"
    assert load("equation_steps:equations_hold") is equation_steps.equations_hold
    # This module loads its names only when they are asked for
    assert load("trl.rewards.think_format_reward") is trl.rewards.think_format_reward
    assert load("Skywork/Skywork-Reward-V2-Qwen3-0.6B") == "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    assert load(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("nowhere.rewards:score", ImportError, "no module 'nowhere'"),
        ("reasoning_gym_task.nowhere:score", ImportError, "no module 'reasoning_gym_task.nowhere'"),
        ("reasoning_gym_task:task_scores", ImportError, "'reasoning_gym_task' has no 'task_scores'.*task_score"),
        ("nowhere.py:score", FileNotFoundError, "no file 'nowhere.py'"),
        ("FILE", ValueError, "write .*my_rewards.py:FUNCTION"),
        ("FILE:LIMIT", ValueError, "is of type int, not a function"),
        ("fractions:Fraction", ValueError, r"is a class; write `fraction = Fraction\(\.\.\.\)` in the module"),
        ("accuracy", ValueError, "neither"),
    ],
)
def test_reward_that_cannot_be_found(spec, error, message, reward_file):
    with pytest.raises(error, match=message):
        grpo.load_reward(spec.replace("FILE", str(reward_file)))


def test_missing_dependency_of_a_reward_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere_to_be_found'"):
        grpo.load_reward("needs_more:score")


def test_number_of_weights():
    with pytest.raises(ValueError, match="3 reward_weights .* for 1 reward_funcs"):
        grpo.load_rewards(["a.b"], [1.0, 2.0, 3.0])


# --- The process source ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, verdicts",
    [
        ("4 + 9 = 13", [True]),
        ("So 4 + 9 = 12, clearly.", [False]),
        ("1. 3 + 4 = 7", [True]),
        ("- 3 + 4 = 7", [True]),
        ("**3 + 4 = 7**", [True]),
        ("-3 + 4 = 1", [True]),
        ("4 - -3 = 7", [True]),
        ("2 + 3 × 4 = 14", [True]),
        ("10 − 12 = −2", [True]),
        ("0.1 + 0.2 = 0.3", [True]),
        ("7 / 2 = 3", [False]),
        ("1,000 + 24 = 1,024", [True]),
        ("4 + 9 + 2 = 13 + 2 = 15", [True]),
        ("4 + 9 + 2 = 13 + 2 = 16", [False]),
        ("4 + 9 = 13, 13 - 2 = 10", [True, False]),
        ("(1 + 2) * 3 + 4 = 13", []),
        ("1 + 2 = 3 * (4 - 3)", []),
        ("2x + 3 = 5", []),
        ("2 ** 3 = 8", []),
        ("6 / 0 = 3", []),
        ("07 + 1 = 8", []),
        ("The answer is 5 = 5", []),
        ("nothing to judge", []),
        ("1" * 300 + " + 1 = 2", []),
    ],
)
def test_equations_of_a_line(line, verdicts):
    assert list(equation_steps.judge_equations(line).values()) == verdicts


def judge(tokenizer, ids):
    """The source on one completion of a policy with this tokenizer."""
    source = copy.copy(equation_steps.equations_hold)
    source.prepare(None, tokenizer, None)
    (rewards,) = source(prompts=["sum"], completion_ids=[ids])
    return rewards


def test_right_wrong_and_repeated_lines(byte_tokenizer):
    text = "4 + 9 = 13\n4 + 9 = 13\nhm\n13 - 2 = 12\n4+9=13, 13 - 2 = 11\n"
    assert judge(byte_tokenizer, byte_tokenizer.encode(text)).values == [1.0, 0.0, None, 0.0, 1.0]


@pytest.mark.parametrize(
    "text, ends, values",
    [
        # The newline belongs to the line that it ends
        ("1+1=2\n2+2=5", [5, 10], [1.0, 0.0]),
        ("1+1=2\n2+2=5\n\n", [5, 12], [1.0, 0.0]),
        # "3\n" is one token, and it completes the first line
        ("1+2=3\n2+2=4", [4, 9], [1.0, 1.0]),
        # "\n5" is one token: the first line ends within it
        ("1+1=2\n5+2=7", [5, 9], [1.0, 1.0]),
        # two bytes for "é", four for the emoji, three for the minus sign
        ("é 1+1=2\n😀 4−1=3", [8, 20], [1.0, 1.0]),
        ("1+1=2  \nso", [7, 9], [1.0, None]),
        ("1+1=2<end>", [4], [1.0]),
        ("1+1=2\n<end>", [5], [1.0]),
    ],
)
def test_steps_end_on_the_token_that_completes_the_line(text, ends, values, byte_tokenizer):
    steps = judge(byte_tokenizer, byte_tokenizer.encode(text))
    assert (steps.ends, steps.values) == (ends, values)


@pytest.mark.parametrize("text", ["", "<end>", "\n\n"])
def test_completion_without_a_line(text, byte_tokenizer):
    assert judge(byte_tokenizer, byte_tokenizer.encode(text)) == StepRewards([], [])


def test_completion_without_a_judgeable_line(byte_tokenizer):
    assert judge(byte_tokenizer, byte_tokenizer.encode("no equation\nat all")) is None


def test_cut_off_character_at_the_end(byte_tokenizer):
    ids = byte_tokenizer.encode("1+1=2\n😀")[:-2]
    # It says nothing by itself, so it belongs to the line before
    assert judge(byte_tokenizer, ids) == StepRewards([len(ids) - 1], [1.0])


def test_lines_that_end_in_one_token_are_one_step(byte_tokenizer):
    """No real vocabulary at hand has such a token, so add one; the wrong line decides."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str()))
    tokenizer.add_tokens([AddedToken("2\n1+1=3\n", normalized=False)])
    steps = judge(tokenizer, tokenizer.encode("1+1=2\n1+1=3\n1+3=4"))
    assert (steps.ends, steps.values) == ([4, 9], [0.0, 1.0])


# In the process that loads it for other tests too, which takes seconds
@pytest.mark.xdist_group("tokenizers")
def test_steps_with_the_tokenizer_of_smollm2(smollm2_tokenizer):
    lines = ["Énoncé: 14 + 9 = 23.", "", "23 − 21 = 2 😀\t", "2 + 2 = 5\n\n", "10 - 5 = 5"]
    text = "\n".join(lines) + "<|im_end|>"
    ids = smollm2_tokenizer.encode(text)
    steps = judge(smollm2_tokenizer, ids)
    assert steps.values == [1.0, 1.0, 0.0, 1.0]
    for end, line in zip(steps.ends, [line for line in lines if line], strict=True):
        assert smollm2_tokenizer.decode(ids[: end + 1]).rstrip().endswith(line.rstrip())


# --- The outcome source ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("4 + 9 = 13\n13 - 2 = 11", "11"),
        ("The answer is 1,024.", "1,024"),
        ("so it is -3", "-3"),
        ("<answer> 7 </answer> out of 10", "7"),
        ("I do not know", None),
    ],
)
def test_final_answer(completion, answer):
    assert reasoning_gym_task.final_answer(completion) == answer
    assert reasoning_gym_task.final_answer([{"role": "assistant", "content": completion}]) == answer


def test_score_is_the_task_s_own():
    rows = reasoning_gym_task.task_rows("chain_sum", {"size": 2})
    completions = [[{"role": "assistant", "content": f"that makes {rows[0]['answer']}"}], "no idea"]
    columns = {"task": rows["task"][:], "entry": rows["entry"][:], "answer": rows["answer"][:]}
    assert reasoning_gym_task.task_score(completions, **columns) == [1.0, 0.0]


# --- A whole run -----------------------------------------------------------------------------------------------------


def test_two_steps_of_the_config_on_a_tiny_model(forked_python, tmp_path, byte_tokenizer, reward_file):
    end = byte_tokenizer.eos_token_id
    sizes = {"vocab_size": len(byte_tokenizer), "max_position_embeddings": 512}
    model = save_tiny_model(tmp_path / "model", pad_token_id=end, bos_token_id=end, eos_token_id=end, **sizes)
    byte_tokenizer.save_pretrained(model)
    command = f"""
        -m accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1 --mixed_precision no
        --dynamo_backend no {RECIPES / "grpo.py"} --config {SMOLLM2_CONFIG}
        --model_name_or_path {model} --output_dir {tmp_path / "out"} --max_steps 2
        --reward_funcs {reward_file}:lower reasoning_gym_task.task_score --gamma 0.9 1.0
        --max_completion_length 8 --eval_steps 2 --eval_size 16 --learning_rate 0.01
    """
    run = subprocess.run([forked_python, *command.split()], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert unexpected_lines(run.stderr) == []

    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first, second = [entry for entry in log if "loss" in entry]
    assert 0 <= first["kl"] < 1e-8 < second["kl"]
    assert first["rewards/lower/std"] > 0
    assert "rewards/task_score/mean" in second
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [0, 2]
    assert (tmp_path / "out" / "adapter_config.json").is_file()
