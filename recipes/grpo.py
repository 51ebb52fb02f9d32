"""
GRPO with process supervision, weighted reward sources and an exact KL, for any model, data and reward sources.

    python recipes/grpo.py --config recipes/configs/smollm2_chain_sum.yaml --learning_rate 1e-4

All fields of [`ScriptArguments`], [`~trl_grpo_ext.GRPOExtConfig`] and [`~trl.ModelConfig`] can stand in the YAML file
and on the command line, which wins. `--help` lists them. A file for `trl grpo` can be used as it is.
"""

import importlib
import importlib.util
import inspect
import json
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import trl.rewards
from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments
from upstream_warnings import ignore_upstream_warnings

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, open_reward_models


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TASK_PREFIX = "reasoning_gym:"
# What `trl grpo` takes without a module
TRL_REWARDS = (
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_soft_overlong_punishment",
)


@dataclass
class ScriptArguments(GRPOScriptArguments, DatasetMixtureConfig):
    """
    What to train on and what to reward.

    The fields of TRL's script are here too: `dataset_name` with `dataset_config`, `dataset_train_split`,
    `dataset_test_split` and `dataset_streaming`, or `datasets` with `streaming` and `test_split_size`, in place of
    `dataset`; `reward_model_name_or_path` before `reward_funcs`. They mean what they mean there.

    Args:
        dataset (`str`, *optional*):
            A Hub dataset id, a folder, a `.jsonl`, `.json`, `.parquet` or `.csv` file, or a reasoning-gym task as
            `reasoning_gym:chain_sum`.
        reward_funcs (`list[str]`, *optional*):
            The reward sources, in the order of `reward_weights`; see [`load_reward`].
        reward_model_options (`dict`, *optional*):
            A mapping in YAML, JSON on the command line: keyword arguments of
            [`~trl_grpo_ext.ProcessRewardModel.from_pretrained`] for all reward models, such as `dtype`,
            `quantization_config`, `offload`, `segmentation` (`{by: blank_line, scope: answer}`) or `problem`
            (`{column: question}`). What it leaves out is as for the policy, but nothing is quantised.
        dataset_options (`dict`, *optional*):
            A mapping in YAML, JSON on the command line. For a reasoning-gym task its options (`size`, `seed`,
            `min_terms`, ...), otherwise keyword arguments of [`~datasets.load_dataset`] (`name`, `revision`, ...).
        train_split (`str`, *optional*):
            Split to train on; slices such as `train[:90%]` work. Not for reasoning-gym tasks. By default that of
            `dataset_train_split`, `"train"`.
        eval_split (`str`, *optional*):
            Split to evaluate on. Not for reasoning-gym tasks.
        eval_size (`int`, *optional*, defaults to `0`):
            Instead of `eval_split`: hold out this many rows from the end of the training data, and drop training rows
            that have a held-out prompt.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompts, each a string or a list of messages.
        system_prompt (`str`, *optional*):
            System message put before every prompt.
        examples (`list[list[str]]`, *optional*):
            Worked examples put before every prompt, as `[question, answer]` pairs: a YAML list, JSON on the command
            line. With these or a system prompt, a string prompt becomes a user message.
    """

    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub dataset id, folder, .jsonl/.json/.parquet/.csv file or `reasoning_gym:TASK`."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward sources, in order: `package.module.function`, `package.module:function`, "
            "`path/to/file.py:function`, a reward model's Hub id or folder, or a name of TRL's script."
        },
    )
    reward_model_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "How reward models are loaded, as JSON: dtype, quantization_config, offload, ..."},
    )
    dataset_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the reasoning-gym task, or keyword arguments of load_dataset, as JSON."},
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on. Default: that of dataset_train_split."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_size: int = field(default=0, metadata={"help": "Rows to hold out from the training data for evaluation."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before every prompt."})
    examples: list[list[str]] | str | None = field(
        default=None, metadata={"help": "Worked examples put before every prompt: JSON list of [question, answer]."}
    )

    def __post_init__(self):
        super().__post_init__()
        # A YAML string where a list belongs reaches the parser as it is
        functions = [self.reward_funcs] if isinstance(self.reward_funcs, str) else self.reward_funcs or []
        model = self.reward_model_name_or_path
        self.reward_funcs = functions if model is None else [model, *functions]
        if not self.reward_funcs:
            raise ValueError("reward_funcs is missing: the reward sources, in order.")
        self.reward_model_options = parse_json(self.reward_model_options, "reward_model_options", dict) or {}
        self.dataset_options = parse_json(self.dataset_options, "dataset_options", dict) or {}
        self.examples = parse_json(self.examples, "examples", list) or []
        if any(len(pair) != 2 for pair in self.examples):
            raise ValueError(f"examples must be [question, answer] pairs; got {self.examples!r}.")
        if self.eval_split is not None and self.eval_size:
            raise ValueError("Give eval_split or eval_size, not both.")
        self.train_split = self.train_split or self.dataset_train_split
        self._take_dataset_name()

    def _take_dataset_name(self) -> None:
        """Bring TRL's names of a data set to those of this script; `datasets` wins over both, as in TRL."""
        if bool(self.dataset) == bool(self.dataset_name or self.datasets):
            raise ValueError("Give the data as dataset, or under TRL's names, dataset_name or datasets.")
        if self.dataset is None:
            self.dataset = self.dataset_name
            options = {"name": self.dataset_config, "streaming": self.dataset_streaming}
            self.dataset_options = {name: value for name, value in options.items() if value} | self.dataset_options


def parse_json(value: Any, name: str, kind: type) -> Any:
    """The value of a field that is a mapping or list in YAML and JSON text on the command line."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON ({error}): {value}") from error
    if parsed is not None and not isinstance(parsed, kind):
        raise ValueError(f"{name} must be a {kind.__name__}; got {parsed!r}.")
    return parsed


def looks_like_model(spec: str) -> bool:
    """Whether an entry of `reward_funcs` is a reward model's folder or id rather than a function."""
    return ":" not in spec and (Path(spec).is_dir() or ("/" in spec and not spec.endswith(".py")))


def load_reward(spec: str) -> Any:
    """
    The reward source that `spec` names, as `reward_funcs` of the trainer takes it.

    - `path/to/file.py:name`, `package.module:name` or `package.module.name`: a reward function with TRL's signature,
      or one made by `@step_reward`. Modules beside this script and in the working directory are found.
    - a folder, or an id with a slash: a reward model, loaded by the trainer.

    Raises:
        ValueError, ImportError, FileNotFoundError: naming the part of `spec` that could not be found.
    """
    if looks_like_model(spec):
        return spec
    if spec in TRL_REWARDS:
        return load_trl_reward(spec)
    where, _, name = spec.rpartition(":")
    if not where:
        if spec.endswith(".py"):
            raise ValueError(f"reward_funcs: {spec!r} names a file; write {spec}:FUNCTION.")
        where, _, name = spec.rpartition(".")
    if not where:
        close = get_close_matches(spec, TRL_REWARDS) or TRL_REWARDS
        raise ValueError(
            f"reward_funcs: {spec!r} is neither module.function, module:function, file.py:function, nor a reward "
            f"model's folder or organisation/name on the Hub, nor one of TRL's: {', '.join(close)}."
        )
    if not (name.isidentifier() and (where.endswith(".py") or where.replace(".", "").isidentifier())):
        raise ValueError(
            f"reward_funcs: {spec!r} is not the import path of a function, and no folder. A reward model on the Hub "
            "is ORGANISATION/NAME."
        )
    module = load_file(where, spec) if where.endswith(".py") else load_module(where, spec)
    try:
        # Some modules, such as `trl.rewards`, load a name only when it is asked for
        source = getattr(module, name)
    except AttributeError:
        public = [known for known in dir(module) if not known.startswith("_")]
        close = get_close_matches(name, public) or public
        raise ImportError(f"reward_funcs: {spec!r}: {where!r} has no {name!r}; it has: {', '.join(close)}.") from None
    if inspect.isclass(source):
        raise ValueError(
            f"reward_funcs: {spec!r} is a class; write `{name.lower()} = {name}(...)` in the module, and name that."
        )
    if not callable(source):
        raise ValueError(f"reward_funcs: {spec!r} is of type {type(source).__name__}, not a function.")
    return source


def load_trl_reward(name: str) -> Any:
    """One of the rewards that TRL's script knows by a short name, with the settings that it has there."""
    if name == "get_soft_overlong_punishment":
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    return getattr(trl.rewards, name)


def load_module(name: str, spec: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Without this distinction, a missing dependency of the user's module would look like a wrong path
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ImportError(f"reward_funcs: {spec!r}: there is no module {error.name!r}.") from error


def load_file(path: str, spec: str) -> ModuleType:
    if not Path(path).is_file():
        raise FileNotFoundError(f"reward_funcs: {spec!r}: there is no file {path!r}.")
    # A name of its own: a file called random.py must not become Python's `random`
    module_spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    return module


def load_rewards(specs: list[str], weights: list[float] | None) -> list[Any]:
    """All reward sources, after a check that there are as many weights."""
    if weights is not None and len(weights) != len(specs):
        raise ValueError(f"{len(weights)} reward_weights {weights} for {len(specs)} reward_funcs {specs}.")
    return [load_reward(spec) for spec in specs]


def load_split(args: ScriptArguments, split: str) -> Dataset:
    """The rows of one split, as they are stored."""
    options = args.dataset_options
    if args.dataset.startswith(TASK_PREFIX):
        # Imported here because only these data sets need reasoning-gym
        from reasoning_gym_task import task_rows

        return task_rows(args.dataset.removeprefix(TASK_PREFIX), options)
    path = Path(args.dataset)
    if path.suffix not in FILE_FORMATS:
        return load_dataset(args.dataset, split=split, **options)
    if not path.is_file():
        raise FileNotFoundError(f"dataset: there is no file {args.dataset!r}.")
    return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)


def with_prompts(dataset: Dataset, args: ScriptArguments) -> Dataset:
    """The data set with TRL's `prompt` column: system message, worked examples, then the row's own prompt."""
    # Streamed files tell their columns only with the first row
    columns = dataset.column_names or list(next(iter(dataset)))
    if args.prompt_column not in columns:
        raise ValueError(
            f"dataset {args.dataset!r} has no column {args.prompt_column!r} to prompt with; it has: "
            f"{', '.join(columns)}. Name one with prompt_column."
        )
    if args.prompt_column != "prompt":
        dataset = dataset.remove_columns([c for c in columns if c == "prompt"])
        dataset = dataset.rename_column(args.prompt_column, "prompt")
    before = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    for question, answer in args.examples:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return dataset.map(put_before, fn_kwargs={"messages": before}) if before else dataset


def put_before(row: dict[str, Any], messages: list[dict[str, str]]) -> dict[str, Any]:
    prompt = row["prompt"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == prompt[0]["role"] == "system":
        raise ValueError("The data set's prompts have a system message already; leave system_prompt out.")
    return {"prompt": messages + prompt}


def load_data(args: ScriptArguments, evaluates: bool = False) -> tuple[Dataset, Dataset | None]:
    """Training rows, and evaluation rows if any were asked for, which TRL's names do with `eval_strategy`."""
    # Once: TRL draws the test rows of a mixture at random
    mixture = get_dataset(args) if args.datasets else None

    def split(name: str) -> Dataset:
        return with_prompts(load_split(args, name) if mixture is None else mixture[name], args)

    train = split(args.train_split)
    eval_split = args.eval_split
    if eval_split is None and evaluates and not args.eval_size and (args.dataset_name or args.datasets):
        eval_split = args.dataset_test_split
    if eval_split is not None:
        if mixture is None and args.dataset.startswith(TASK_PREFIX):
            raise ValueError(f"dataset {args.dataset!r} has no splits; use eval_size.")
        return train, split(eval_split)
    if args.eval_size == 0:
        return train, None
    if not isinstance(train, Dataset):
        raise ValueError("eval_size holds out the last rows, and streamed data has no last one; use eval_split.")
    if not 0 < args.eval_size < len(train):
        raise ValueError(f"eval_size must be between 1 and {len(train) - 1}, the training rows less one.")
    held_out = train.select(range(len(train) - args.eval_size, len(train)))
    # Small generated tasks repeat problems, and those would be trained on and evaluated
    prompts = {json.dumps(prompt) for prompt in held_out["prompt"]}
    return train.filter(lambda row: json.dumps(row["prompt"]) not in prompts), held_out


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, GRPOExtConfig, ModelConfig))


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, GRPOExtConfig, ModelConfig]:
    """The command line, by default that of this process, and the YAML file that it names."""
    parser = make_parser()
    *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        close = get_close_matches(unknown[0], options, n=1)
        raise ValueError(f"nothing reads {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "."))
    return tuple(parsed)


def make_trainer(
    script_args: ScriptArguments, training_args: GRPOExtConfig, model_args: ModelConfig
) -> GRPOExtTrainer:
    """Model, reward sources and data, loaded and put together."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: a Hub id or a folder.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    # All processes draw the same test rows
    set_seed(training_args.seed)
    train_dataset, eval_dataset = load_data(script_args, training_args.eval_strategy != "no")
    rewards = load_rewards(script_args.reward_funcs, training_args.reward_weights)
    if script_args.reward_model_options:
        rewards = open_reward_models(rewards, {**training_args.model_init_kwargs, **script_args.reward_model_options})
    return GRPOExtTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def main(script_args: ScriptArguments, training_args: GRPOExtConfig, model_args: ModelConfig) -> None:
    ignore_upstream_warnings()
    trainer = make_trainer(script_args, training_args, model_args)
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"Model and trainer_state.json saved in {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset)
    # Gloo's threads may need Python's lock to finish; they have it while this waits, but not in the next line
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*parse())
