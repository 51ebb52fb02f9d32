"""The command line: TRL's own script trains with our config and trainer, from TRL's YAML files."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.scripts import grpo

from tests.support.training import fixed_completions
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, cli


# Stands in a folder of its own, which is the working directory of the command
REWARDS = """
from trl_grpo_ext import step_reward


@step_reward(by="newline")
def judge_steps(problem, steps):
    return [float(len(step) % 3) for step in steps]


def judge_length(completion_ids, target, **columns):
    return [-abs(len(ids) - wanted) / 10 for ids, wanted in zip(completion_ids, target)]
"""


@pytest.fixture
def run_folder(tmp_path, tiny_model, monkeypatch) -> Path:
    """A working directory with a data set in files, rewards of a module, and `run.yaml`."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": prompt, "target": 4} for prompt in ("1+1=", "2+2=", "3+4=", "9-5=")]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "line_rewards.py").write_text(REWARDS)
    options = {
        "model_name_or_path": tiny_model,
        "dtype": "float32",
        "dataset_name": str(data),
        "reward_funcs": ["line_rewards.judge_steps", "line_rewards.judge_length", "get_soft_overlong_punishment"],
        "output_dir": "out",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        # Fields of this package, one as a list with an entry for each source
        "supervision": "process",
        "gamma": [0.9, 1.0, 1.0],
        "reward_weights": [0.5, 1.0, 0.25],
        "kl_estimator": "exact",
        # For the launcher
        "num_processes": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.chdir(tmp_path)
    # TRL's script puts the working directory on the path
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_trls_script_trains_our_trainer_from_its_yaml_file(run_folder, monkeypatch):
    trained = []
    train = GRPOExtTrainer.train

    def remembered_train(self, **options):
        trained.append(self)
        return train(self, **options)

    monkeypatch.setattr(GRPOExtTrainer, "train", remembered_train)
    cli.main(["--config", "run.yaml", "--max_steps", "1", "--gamma", "0.8", "0.9", "1.0"])
    (trainer,) = trained
    assert trainer.args.gamma == [0.8, 0.9, 1.0] and trainer.args.max_steps == 1
    assert trainer.reward_func_names == ["judge_steps", "judge_length", "soft_overlong_punishment_reward"]
    logged = trainer.state.log_history[0]
    assert {"kl/k3", "policy_loss", "rewards/judge_steps/step_mean"} <= logged.keys()
    assert "`process`" in (run_folder / "out" / "README.md").read_text()
    # Other code of this process meets TRL's own classes again
    assert (trl.GRPOTrainer, trl.GRPOConfig, trl.TrlParser) == (GRPOTrainer, GRPOConfig, TrlParser)


def test_the_installed_command_trains_in_a_process_of_accelerate(run_folder, forked_python):
    """Which runs `python -m trl_grpo_ext --config run.yaml`."""
    command = "from trl_grpo_ext.cli import launch; launch()"
    ran = subprocess.run(
        [forked_python, "-c", command, "--cpu", "--num_machines", "1", "--config", "run.yaml"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "'rewards/judge_steps/step_mean'" in ran.stdout
    assert (run_folder / "out" / "model.safetensors").is_file()
    assert re.search(r"\| `judge_steps` \| 0\.5 \| 0\.9 \|", (run_folder / "out" / "README.md").read_text())


def test_the_launcher_gives_accelerate_its_options_and_the_script_the_others(run_folder, monkeypatch):
    launched = []
    monkeypatch.setattr(cli, "launch_command", launched.append)
    cli.launch(["--learning_rate", "2", "--num_machines", "2", "--config", "run.yaml", "--accelerate_config", "zero2"])
    (options,) = launched
    assert options.module and options.training_script == "trl_grpo_ext"
    assert options.training_script_args == ["--learning_rate", "2", "--config", "run.yaml"]
    # On the line, in the file, and a name that TRL resolves
    assert (options.num_machines, options.num_processes) == (2, 1)
    assert Path(options.config_file).name == "zero2.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--supervison", "process"],
            r"no option.*--supervison; did you mean --supervision\?|an option --supervison; did",
        ),
        (["--num_processes", "2"], "--num_processes is an option of `trl-grpo-ext`"),
    ],
    ids=["misspelt", "launcher's"],
)
def test_an_option_that_the_script_does_not_know_is_refused(run_folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(["--config", "run.yaml", *arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kl_estimater: exact", "did you mean --kl_estimator"),
        ("multi_gpu: true", "takes no value, and is given 'True'"),
        ("model_name_or_path: null", "--model_name_or_path is missing"),
        ("reward_funcs: [Qwen/Qwen2.5-Math-PRM-7B]", "belongs into --reward_model_name_or_path"),
    ],
)
def test_a_key_of_the_yaml_file_that_nothing_reads_or_can_read_is_refused(run_folder, capsys, line, message):
    with (run_folder / "run.yaml").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(SystemExit):
        cli.launch(["--config", "run.yaml"])
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("usage: trl-grpo-ext [-h] [--config FILE.yaml] [--option value ...]\n")


def test_a_single_reward_may_stand_without_a_list(run_folder):
    with (run_folder / "run.yaml").open("a") as file:
        file.write("reward_funcs: line_rewards.judge_length\nreward_weights: 0.5\ngamma: 0.9\n")
    parsed = cli._parse(cli.make_parser(), ["--config", "run.yaml"])
    assert parsed.script[0].reward_funcs == ["line_rewards.judge_length"]
    assert parsed.script[1].reward_weights == [0.5]


def test_help_lists_every_option_once_in_groups_ours_first(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w+ \(\w+\)):$", text, re.M)
    assert titles[:2] == ["GRPOExtConfig (trl_grpo_ext)", "GRPOScriptArguments (trl)"]
    ours = text[text.index(titles[0]) : text.index(titles[1])]
    listed = re.findall(r"^  --(\w+)", text, re.M)
    own = {field.name for field in fields(GRPOExtConfig)} - {field.name for field in fields(GRPOConfig)}
    assert set(re.findall(r"^  --(\w+)", ours, re.M)) >= own
    assert len(listed) == len(set(listed))
    assert set(listed) == {action.dest for action in grpo.make_parser()._actions if action.dest != "help"} | own | {
        option for option in listed if option.startswith("no_")
    }


def test_a_script_that_takes_its_trainer_from_elsewhere_does_not_run(monkeypatch):
    def script(*arguments):
        from trl.trainer.grpo_trainer import GRPOTrainer

        return GRPOTrainer

    monkeypatch.setattr(cli, "grpo", SimpleNamespace(main=script, make_parser=grpo.make_parser))
    monkeypatch.setattr(cli, "_parse", lambda parser, arguments: cli._CommandLine([None] * 4, [], []))
    with pytest.raises(ImportError, match=r"script` no longer imports `GRPOTrainer` from `trl`"):
        cli.main([])


def test_a_config_of_ones_own_takes_ours_as_its_base(tiny_model, tmp_path):
    """As open-r1's does TRL's: the README says so."""

    @dataclass
    class OwnConfig(GRPOExtConfig):
        system_prompt: str | None = None
        callbacks: list[str] | None = None

    line = f"--output_dir {tmp_path} --system_prompt Think. --gamma 0.5 --supervision process --use_cpu --bf16 false"
    parser = cli.GroupedParser([OwnConfig])
    (args,) = parser.parse_args_and_config([*line.split(), "--report_to", "none", "--num_generations", "4"])
    assert (args.system_prompt, args.gamma) == ("Think.", 0.5)
    assert parser.format_help().index("GRPOExtConfig (trl_grpo_ext)") < parser.format_help().index("OwnConfig (tests)")
    trainer = GRPOExtTrainer(
        tiny_model,
        [lambda completions, **columns: [0.0] * len(completions)],
        args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}),
        rollout_func=fixed_completions([2, 3, 4, 5]),
    )
    assert trainer.args.system_prompt == "Think."
