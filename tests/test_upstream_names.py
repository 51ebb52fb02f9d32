"""The names that the package relies on: complete today, all listed, and named one by one when a TRL differs."""

import ast
import dataclasses
import functools
import inspect
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path
from types import FunctionType

import pytest
import transformers
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import GRPOExtConfig
from trl_grpo_ext import _upstream_names as names


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_grpo_ext"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}

PARAMETERS = [(function, name) for function, row in names._PARAMETERS.items() for name in row if name is not ...]
ATTRIBUTES = [(method, name) for method, row in names._ATTRIBUTES.items() for name in sorted(row)]
CONSTANTS = [(method, name) for method, row in names._CONSTANTS.items() for name in sorted(row, key=repr)]
FIELDS = [(owner, name) for owner, row in names._FIELDS.items() for name in sorted(row)]
METHODS = sorted({*names._PARAMETERS, *names._ATTRIBUTES, *names._CONSTANTS})
PRIVATE_NAMES = [name for row in names.PRIVATE_NAMES.values() for name in row]


def short(name):
    return name.partition(":")[2]


def replace(monkeypatch, name, value):
    """Put `value` where `module:qualified_name` is, until the test ends."""
    separator = "." if "." in short(name) else ":"
    owner, _, attribute = name.rpartition(separator)
    owner = pkgutil.resolve_name(owner)
    if isinstance(inspect.getattr_static(owner, attribute), staticmethod):
        value = staticmethod(value)
    monkeypatch.setattr(owner, attribute, value)


def edited(name, **code_changes):
    """A function without its decorators, with another code object; nothing of it is ever run."""
    function = inspect.unwrap(pkgutil.resolve_name(name))
    code = function.__code__.replace(**{key: change(function.__code__) for key, change in code_changes.items()})
    return FunctionType(code, function.__globals__, function.__name__, closure=function.__closure__)


def without_constant(code, constant):
    """Constants of a code object with one renamed, in tuples and in inner functions too."""
    renamed = []
    for value in code.co_consts:
        if isinstance(value, type(code)):
            value = value.replace(co_consts=without_constant(value, constant))
        elif isinstance(value, tuple):
            value = tuple("renamed" if item == constant else item for item in value)
        renamed.append("renamed" if value == constant else value)
    return tuple(renamed)


# ---------------------------------------------------------------------------------------------------------------------
# Each difference is named


def test_nothing_differs_in_the_installed_versions():
    assert names.changed_names() == []
    names.check_names()


@pytest.mark.parametrize("name", [*METHODS, *names._FIELDS, *PRIVATE_NAMES], ids=short)
def test_a_name_that_is_gone_is_named(name, monkeypatch):
    separator = "." if "." in short(name) else ":"
    owner, _, attribute = name.rpartition(separator)
    monkeypatch.delattr(pkgutil.resolve_name(owner), attribute)
    changes = names.changed_names()
    assert f"`{short(name)}` is gone" in changes
    assert all(change.startswith(f"`{short(name)}") for change in changes)


@pytest.mark.parametrize(("function", "dropped"), PARAMETERS)
def test_a_parameter_that_is_gone_is_named(function, dropped, monkeypatch):
    found = pkgutil.resolve_name(function)
    signature = inspect.signature(found)
    kept = [parameter for name, parameter in signature.parameters.items() if name != dropped]
    # A class has its signature by itself
    monkeypatch.setattr(found, "__signature__", signature.replace(parameters=kept), raising=False)
    (change,) = names.changed_names()
    taken, expected = change.split(" where ")
    assert f"`{short(function)}` takes" in taken
    assert repr(dropped) not in taken and repr(dropped) in expected


def test_a_parameter_that_is_new_is_named_where_all_are_passed_on_by_name(monkeypatch):
    signature = inspect.signature(GRPOTrainer._compute_loss)
    parameter = inspect.Parameter("num_items", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    more = signature.replace(parameters=[*signature.parameters.values(), parameter])
    monkeypatch.setattr(GRPOTrainer._compute_loss, "__signature__", more, raising=False)
    (change,) = names.changed_names()
    assert "`GRPOTrainer._compute_loss` takes ['self', 'model', 'inputs', 'num_items'] where" in change


@pytest.mark.parametrize(("method", "attribute"), ATTRIBUTES)
def test_an_attribute_that_a_method_no_longer_uses_is_named(method, attribute, monkeypatch):
    def rename(code):
        return tuple("renamed" if name == attribute else name for name in code.co_names)

    replace(monkeypatch, method, edited(method, co_names=rename))
    assert names.changed_names() == [f"`{short(method)}` no longer uses `{attribute}`"]


@pytest.mark.parametrize(("method", "constant"), CONSTANTS)
def test_a_constant_that_a_method_no_longer_uses_is_named(method, constant, monkeypatch):
    replace(monkeypatch, method, edited(method, co_consts=lambda code: without_constant(code, constant)))
    assert names.changed_names() == [f"`{short(method)}` no longer uses {constant!r}"]


@pytest.mark.parametrize(("owner", "field"), FIELDS)
def test_a_field_that_is_gone_is_named(owner, field, monkeypatch):
    monkeypatch.delitem(pkgutil.resolve_name(owner).__dataclass_fields__, field)
    assert names.changed_names() == [f"`{short(owner)}` no longer has the field `{field}`"]


@pytest.mark.parametrize("variable", [*names.HEAD_VARIABLES.values(), names.PLAIN_FORWARD_VARIABLE])
def test_a_head_setting_that_is_gone_is_named(variable, monkeypatch):
    name = "trl.trainer.utils:add_fused_lm_head"

    def rename(code):
        return tuple("renamed" if cell == variable else cell for cell in code.co_cellvars)

    def rename_local(code):
        return tuple("renamed" if local == variable else local for local in code.co_varnames)

    replace(monkeypatch, name, edited(name, co_cellvars=rename, co_varnames=rename_local))
    assert f"`add_fused_lm_head` no longer resolves `{variable}`" in names.changed_names()


def test_all_changes_are_listed_with_the_versions_and_the_way_out(monkeypatch):
    name = "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss"
    replace(monkeypatch, name, edited(name, co_names=lambda code: ()))
    with pytest.raises(ImportError) as error:
        names.check_names()
    lines = str(error.value).splitlines()
    assert f"TRL {version('trl')} " in lines[0] and f"transformers {version('transformers')} " in lines[0]
    assert lines[-1] == "Install a matching version: `pip install 'trl>=1.16,<1.17'`."
    assert len(lines[1:-1]) == len(names._ATTRIBUTES[name])


def test_the_supported_versions_are_those_of_the_project():
    assert f'"{names.SUPPORTED_TRL}"' in (ROOT / "pyproject.toml").read_text("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Each name that is used is listed


def trainer_classes():
    """The classes of this package that extend TRL's trainer, directly or not."""
    classes = [(file, node) for file, tree in TREES.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    extending = {"GRPOTrainer"}
    for _ in classes:
        extending |= {n.name for _, n in classes if {b.id for b in n.bases if isinstance(b, ast.Name)} & extending}
    return [node for _, node in classes if node.name in extending]


def is_super_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def attributes(node, owner):
    """Names of the attributes of `owner`, an expression as source text, inside `node`."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    return {n.attr for n in found if ast.unparse(n.value) == owner}


def listed_attributes():
    return set().union(*names._ATTRIBUTES.values()) | {name.rpartition(".")[2] for name in names._PARAMETERS}


def public_api(name):
    """Whether transformers documents it: a public method of its trainer, or what every callback is given."""
    return not name.startswith("_") and name in vars(transformers.Trainer)


@functools.cache
def own_definitions():
    """Names that this package defines as methods, functions or attributes, or that a named tuple has."""
    found = {"_replace", "_fields", "_asdict"}
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_every_attribute_of_the_trainer_that_is_read_or_set_is_listed():
    upstream = dir(GRPOTrainer) + [name for method in vars(GRPOTrainer).values() for name in stored_names(method)]
    upstream += [name for method in vars(transformers.Trainer).values() for name in stored_names(method)]
    used = set().union(*(attributes(node, "self") for node in trainer_classes())) & set(upstream)
    assert {"beta", "_buffered_inputs", "_push_from_checkpoint"} <= used
    listed = listed_attributes() | {name.rpartition(".")[2] for name in PRIVATE_NAMES}
    assert {name for name in used - listed if not public_api(name)} == set()


def stored_names(method):
    """Attributes of `self` that a method of TRL or transformers may set: all names that its code holds."""
    function = inspect.unwrap(method) if callable(method) else None
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def test_every_method_that_is_overridden_or_called_by_super_is_listed():
    classes = trainer_classes()
    overridden = {n.name for node in classes for n in node.body if isinstance(n, ast.FunctionDef)}
    called = {
        n.attr for node in classes for n in ast.walk(node) if isinstance(n, ast.Attribute) and is_super_call(n.value)
    }
    used = (overridden & set(dir(GRPOTrainer))) | called
    assert {"__init__", "_compute_loss", "create_model_card", "log"} <= used
    listed = {name.rpartition(".")[2] for name in names._PARAMETERS if "Trainer." in name}
    of_trl = {name for base in GRPOTrainer.__mro__ if base.__module__.startswith("trl.") for name in vars(base)}
    assert {name for name in used - listed if name in of_trl or not public_api(name)} == set()


def test_every_field_of_the_config_that_is_read_is_listed():
    trl = {field.name for field in dataclasses.fields(GRPOConfig)}
    used = attributes(TREES["config.py"], "self") | attributes(TREES["config.py"], "config")
    for tree in TREES.values():
        used |= attributes(tree, "self.args") | attributes(tree, "args")
    # transformers has these since 5.23, and the config asks whether it has
    used -= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert used & trl <= names._FIELDS["trl.trainer.grpo_config:GRPOConfig"]
    assert names._FIELDS["trl.trainer.grpo_config:GRPOConfig"] <= {f.name for f in dataclasses.fields(GRPOExtConfig)}


def test_every_key_of_a_batch_that_is_read_is_listed():
    keys = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("inputs", "output"):
            keys.add(node.slice)
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) in ("inputs", "output"):
            keys.add(node.left)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("inputs.get", "inputs.pop"):
            keys.add(node.args[0])
    used = {key.value for key in keys if isinstance(key, ast.Constant)} - {"ref_hidden_states"}
    assert {"completion_mask", "old_per_token_logps", "num_items_in_batch"} <= used
    assert used <= names._CONSTANTS["trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions"]


# Modules whose names their libraries document
DOCUMENTED = {
    "accelerate",
    "accelerate.utils",
    "datasets",
    "peft",
    "transformers",
    "transformers.modeling_outputs",
    "trl",
}
DOCUMENTED_NAMES = {"transformers.utils:logging"}
LIBRARIES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")
# Of Python's own argparse
OF_PYTHON = {"_actions"}


def imported_names(tree):
    """`module:name` of each name that is imported from a library; of a module, each attribute of it that is used."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module.split(".")[0] not in LIBRARIES:
            continue
        for alias in node.names:
            name = f"{node.module}:{alias.name}"
            if name in DOCUMENTED_NAMES or not inspect.ismodule(pkgutil.resolve_name(name)):
                yield name
            else:
                yield from (f"{node.module}.{alias.name}:{attr}" for attr in attributes(tree, alias.name))


def is_private(name):
    module, _, attribute = name.partition(":")
    documented = module in DOCUMENTED or module.split(".")[0] == "torch" or name in DOCUMENTED_NAMES
    return not documented or re.search(r"(^|\.)_", f"{module}.{attribute}") is not None


@pytest.mark.parametrize("file", TREES)
def test_every_private_name_of_a_library_is_listed_with_its_file(file):
    called = {*names._PARAMETERS, *names._FIELDS}
    called |= {name.rpartition(".")[0] for name in called if "." in short(name)}
    used = {name for name in imported_names(TREES[file]) if is_private(name)}
    assert used - called == {name for name in names.PRIVATE_NAMES.get(file, []) if "." not in short(name)}


@pytest.mark.parametrize("file", TREES)
def test_every_underscore_attribute_is_our_own_or_listed(file):
    found = [n.attr for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)]
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    listed = listed_attributes() | {name.replace(":", ".").rpartition(".")[2] for name in PRIVATE_NAMES}
    assert private - own_definitions() - listed - OF_PYTHON == set()


@pytest.mark.parametrize("file", names.PRIVATE_NAMES)
def test_every_private_method_that_is_listed_is_called(file):
    called = {n.attr for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)}
    methods = [name for name in names.PRIVATE_NAMES[file] if "." in short(name)]
    assert {name.rpartition(".")[2] for name in methods} <= called
