"""
The command line: TRL's own GRPO script with the config and the trainer of this package.

| command | runs the script |
|---|---|
| `python -m trl_grpo_ext --config run.yaml` | in this process |
| `accelerate launch -m trl_grpo_ext --config run.yaml` | in the processes that accelerate starts |
| `trl-grpo-ext --config run.yaml` | in the processes that accelerate starts, as `trl grpo` does |

Every file that `trl grpo --config` takes can be used as it is, and may hold the fields of [`GRPOExtConfig`] too.
Options on the command line override it. `reward_funcs` takes TRL's short names, such as `think_format_reward`, and
import paths; `reward_model_name_or_path` takes the id or folder of a reward model.
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import trl
from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo
from trl.scripts.utils import TrlParser

from ._swapped import swapped
from ._upstream_names import mismatch
from .config import GRPOExtConfig
from .trainer import GRPOExtTrainer


_PACKAGE = "trl_grpo_ext"
_DESCRIPTION = (
    "GRPO with process supervision, weighted reward sources and an exact KL: TRL's own script with the config and the "
    "trainer of trl_grpo_ext. A YAML file given with --config may hold every option; the command line overrides it."
)


_USAGE = "%(prog)s [-h] [--config FILE.yaml] [--option value ...]"


class GroupedParser(TrlParser):
    """TRL's parser, whose help lists the options by the class that defines them, this package's own first."""

    def format_usage(self) -> str:
        """The first line of help and errors. Python's own would name 300 options."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(_USAGE, [], [])
        return formatter.format_help()

    def format_help(self) -> str:
        """The text of `--help`."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(_USAGE, [], [])
        formatter.add_text(_DESCRIPTION)
        for title, actions in self._groups().items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _groups(self) -> dict[str, list[argparse.Action]]:
        """The options by the title of the class that defines them, in the order of the help."""
        classes: list[Any] = []
        for dataclass in self.dataclass_types:
            classes += [cls for cls in dataclass.__mro__ if is_dataclass(cls)]
        groups: dict[str, list[argparse.Action]] = {}
        listed: set[str] = set()
        for cls in sorted(classes, key=_is_upstream):
            names = set(inspect.get_annotations(cls)) - listed
            listed |= names
            actions = [action for action in self._actions if action.dest in names]
            if actions:
                groups[f"{cls.__name__.lstrip('_')} ({_package(cls)})"] = actions
        return groups


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _is_upstream(cls: type) -> bool:
    return _package(cls) != _PACKAGE


# Names that TRL's script imports from `trl` each time it runs, and what stands for them
_PARSER_NAMES = {"GRPOConfig": GRPOExtConfig, "TrlParser": GroupedParser}
_TRAINER_NAMES = {"GRPOTrainer": GRPOExtTrainer}


def _imported_from_trl(function: Callable) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "trl"]
    return {alias.name for node in imports for alias in node.names}


@contextmanager
def _with_ours(function: Callable, names: dict[str, Any]) -> Iterator[None]:
    """
    Let a function of TRL's script import our classes by TRL's names.

    Raises:
        ImportError: the function imports them from elsewhere, and would train without anything of this package.
    """
    missing = sorted(set(names) - _imported_from_trl(function))
    if missing:
        where = f"`{function.__module__}.{function.__name__}`"
        raise ImportError(mismatch([f"{where} no longer imports `{name}` from `trl`" for name in missing]))
    with swapped(trl, **names):
        yield


def make_parser(prog: str | None = None) -> GroupedParser:
    """
    The parser of TRL's GRPO script, with the fields of [`GRPOExtConfig`].

    Args:
        prog (`str`, *optional*):
            Name of the program in the help.

    Returns:
        `GroupedParser`: its `parse_args_and_config` gives what `trl.scripts.grpo.main` takes.
    """
    with _with_ours(grpo.make_parser, _PARSER_NAMES):
        return cast(GroupedParser, grpo.make_parser(prog=prog))


class _CommandLine(NamedTuple):
    """
    What a command line says.

    Args:
        script (`list[Any]`):
            What TRL's script takes: its arguments, the config, the model's and the data's.
        launch_options (`list[str]`):
            Options of accelerate, from the YAML file and the command line.
        typed_launch_options (`list[str]`):
            Those of the command line alone.
    """

    script: list[Any]
    launch_options: list[str]
    typed_launch_options: list[str]


def _parse(parser: GroupedParser, arguments: list[str]) -> _CommandLine:
    *script, from_file, typed = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    _check_script(parser, script)
    launch_options = resolve_accelerate_config_argument([*from_file, *typed])
    launched, unknown = launch_command_parser().parse_known_args([*launch_options, "--module", _PACKAGE])
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"neither the script nor accelerate has an option {unknown[0]}{hint}")
    if launched.training_script != _PACKAGE:
        # accelerate would run it as the script
        parser.error(
            f"an option of accelerate takes no value, and is given {launched.training_script!r}: such options belong "
            "on the command line, or into an accelerate_config file."
        )
    return _CommandLine(script, launch_options, typed)


def _check_script(parser: GroupedParser, script: list[Any]) -> None:
    """Bring a single reward to a list, and refuse by name what TRL's script would stumble over."""
    script_args, _, model_args, _ = script
    if isinstance(script_args.reward_funcs, str):
        script_args.reward_funcs = [script_args.reward_funcs]
    if model_args.model_name_or_path is None:
        parser.error("--model_name_or_path is missing: a model's id on the Hub, or its folder")
    for spec in script_args.reward_funcs or []:
        if not spec.replace(".", "").isidentifier():
            parser.error(
                f"--reward_funcs takes import paths of functions, package.module.function, and {spec!r} is none. The "
                "id or folder of a reward model belongs into --reward_model_name_or_path"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train in this process, which accelerate may have started: `python -m trl_grpo_ext`.

    Options of `accelerate launch` are refused on the command line. In the YAML file they are for `trl-grpo-ext`, and
    are passed over here.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line without the program. By default that of this process.

    Raises:
        SystemExit: `--help`, or an option that is not known.
    """
    parser = make_parser(f"python -m {_PACKAGE}")
    parsed = _parse(parser, _given(arguments))
    if parsed.typed_launch_options:
        option = parsed.typed_launch_options[0]
        parser.error(f"{option} is an option of `trl-grpo-ext` and of `accelerate launch {option} ... -m {_PACKAGE}`")
    with _with_ours(grpo.main, _TRAINER_NAMES):
        grpo.main(*parsed.script)


def launch(arguments: Sequence[str] | None = None) -> None:
    """
    Train in the processes that accelerate starts: `trl-grpo-ext`, this package's `trl grpo`.

    Options of `accelerate launch`, and TRL's `accelerate_config`, may stand among the others, in the YAML file too.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line without the program. By default that of this process.

    Raises:
        SystemExit: `--help`, or an option that neither the script nor accelerate knows.
    """
    given = _given(arguments)
    parsed = _parse(make_parser("trl-grpo-ext"), given)
    for_script = _without(given, parsed.typed_launch_options)
    launch_command(launch_command_parser().parse_args([*parsed.launch_options, "--module", _PACKAGE, *for_script]))


def _given(arguments: Sequence[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else list(arguments)


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """The arguments less those of `taken`, which has some of them in the same order."""
    left = list(taken)
    kept = []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return kept
