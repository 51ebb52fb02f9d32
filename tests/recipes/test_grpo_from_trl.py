"""A YAML file that was written for `trl grpo` says the same to recipes/grpo.py."""

import json
import re

import grpo
import pytest
import trl.rewards
import yaml
from trl.scripts import grpo as trl_script


ROWS = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(4)]


@pytest.fixture
def folder(tmp_path):
    """A data set with two splits, as a folder on the disk that `load_dataset` reads."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in {"train": ROWS[:3], "test": ROWS[3:]}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def parse_both(folder, **options):
    """The script's arguments, from a file that TRL's own script takes too."""
    options = {"output_dir": "out", "use_cpu": True, "bf16": False, "reward_funcs": ["think_format_reward"], **options}
    file = folder.parent / "run.yaml"
    file.write_text(yaml.safe_dump(options))
    trl_script.make_parser().parse_args_and_config(["--config", str(file)])
    script_args, training_args, _ = grpo.parse(["--config", str(file)])
    return script_args, training_args


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_a_data_set_by_trls_names(folder, eval_strategy):
    script_args, training_args = parse_both(
        folder, dataset_name=str(folder), eval_strategy=eval_strategy, eval_steps=1
    )
    train, test = grpo.load_data(script_args, training_args.eval_strategy != "no")
    assert train.to_list() == ROWS[:3]
    assert (test.to_list() if eval_strategy == "steps" else test) == (ROWS[3:] if eval_strategy == "steps" else None)


def test_its_config_splits_and_streaming_reach_load_dataset(folder, monkeypatch):
    calls = []
    options = {"dataset_config": "main", "dataset_train_split": "half", "dataset_streaming": True}
    script_args, _ = parse_both(folder, dataset_name="openai/gsm8k", **options)
    monkeypatch.setattr(grpo, "load_dataset", lambda *names, **options: calls.append((*names, options)))
    grpo.load_split(script_args, script_args.train_split)
    assert calls == [("openai/gsm8k", {"split": "half", "name": "main", "streaming": True})]


def test_streamed_rows_are_prompts_too(folder):
    script_args, _ = parse_both(folder, dataset_name=str(folder), dataset_streaming=True)
    train, _ = grpo.load_data(script_args)
    assert [row["prompt"] for row in train] == [row["prompt"] for row in ROWS[:3]]


def test_a_mixture_and_its_test_rows(folder):
    files = [{"path": "json", "data_files": str(folder / f"{name}.jsonl")} for name in ("train", "test")]
    script_args, _ = parse_both(folder, datasets=files, test_split_size=0.25)
    train, test = grpo.load_data(script_args, evaluates=True)
    assert (len(train), len(test)) == (3, 1)
    assert sorted(row["prompt"] for row in [*train, *test]) == [row["prompt"] for row in ROWS]


def test_short_names_of_rewards_and_a_reward_model_before_them(folder):
    names = ["accuracy_reward", "reasoning_accuracy_reward", "get_soft_overlong_punishment"]
    script_args, _ = parse_both(
        folder, dataset_name=str(folder), reward_funcs=names, reward_model_name_or_path="organisation/model"
    )
    sources = grpo.load_rewards(script_args.reward_funcs, None)
    assert sources[:3] == ["organisation/model", trl.rewards.accuracy_reward, trl.rewards.reasoning_accuracy_reward]
    # Of 1,280 tokens the last 256 are punished more and more
    assert sources[3](completion_ids=[[0] * 1024, [0] * 1152, [0] * 1281]) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("options", [{}, {"dataset": "x", "dataset_name": "y"}])
def test_no_data_and_data_twice_are_refused(folder, options):
    with pytest.raises(ValueError, match="Give the data as dataset, or under TRL's names, dataset_name or datasets"):
        grpo.ScriptArguments(reward_funcs=["a.b"], **options)


def test_no_reward_is_refused():
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        grpo.ScriptArguments(dataset="x")


@pytest.mark.parametrize(
    "spec", ["Qwen2.5-Math-PRM-7B", r"C:\models\prm", "C:/models/prm"], ids=["id alone", "Windows", "Windows, slashes"]
)
def test_a_reward_model_without_its_organisation_or_folder_is_named(spec):
    with pytest.raises(ValueError, match=r"is not the import path of a function, and no folder\. A reward model on"):
        grpo.load_reward(spec)


def test_a_misspelt_short_name_is_met_with_the_right_one():
    with pytest.raises(ValueError, match="nor one of TRL's: accuracy_reward"):
        grpo.load_reward("acuracy_reward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kl_estimater", "exact"], "nothing reads --kl_estimater; did you mean --kl_estimator?"),
        (["--config", "FILE"], "nothing reads --dataset_nam; did you mean --dataset_name?"),
    ],
)
def test_a_misspelt_option_is_met_with_the_right_one(tmp_path, arguments, message):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_nam: x\ndataset: y\nreward_funcs: a.b\nbf16: false\nuse_cpu: true\n")
    line = ["--dataset", "y", "--reward_funcs", "a.b", "--bf16", "false", "--use_cpu", "true"]
    with pytest.raises(ValueError, match=re.escape(message)):
        grpo.parse([str(file) if argument == "FILE" else argument for argument in [*line, *arguments]])
