"""What the package relies on in TRL: complete today, and named one by one when a TRL differs."""

import inspect
import subprocess
import sys
from types import FunctionType

import pytest
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from trl_grpo_ext import _trl
from trl_grpo_ext._trl import check_upstream, upstream_changes


METHODS = sorted({*_trl._PARAMETERS, *_trl._ATTRIBUTES, *_trl._CONSTANTS})
PARAMETERS = [(method, name) for method, names in _trl._PARAMETERS.items() for name in names if name is not ...]
ATTRIBUTES = [(method, name) for method, names in _trl._ATTRIBUTES.items() for name in sorted(names)]
CONSTANTS = [(method, name) for method, names in _trl._CONSTANTS.items() for name in sorted(names, key=repr)]


def trainer_with(**methods):
    """TRL's trainer with some methods of its own replaced."""
    own = {name: vars(GRPOTrainer)[name] for name in METHODS}
    return type("GRPOTrainer", (GRPOTrainer,), own | methods)


def edited(method, **code_changes):
    """TRL's method, without its decorators, with another code object; nothing of it is ever run."""
    function = inspect.unwrap(vars(GRPOTrainer)[method])
    code = function.__code__.replace(**{name: change(function.__code__) for name, change in code_changes.items()})
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


def test_nothing_differs_in_the_installed_trl():
    assert upstream_changes() == []
    assert upstream_changes(trainer_with()) == []
    check_upstream()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_gone_is_named(method):
    trainer = trainer_with()
    delattr(trainer, method)
    assert upstream_changes(trainer) == [f"`GRPOTrainer.{method}` is gone"]


@pytest.mark.parametrize(("method", "dropped"), PARAMETERS)
def test_a_parameter_that_is_gone_is_named(method, dropped):
    signature = inspect.signature(vars(GRPOTrainer)[method])
    kept = [parameter for name, parameter in signature.parameters.items() if name != dropped]
    replaced = edited(method)
    replaced.__signature__ = signature.replace(parameters=kept)
    (change,) = upstream_changes(trainer_with(**{method: replaced}))
    taken, expected = change.split(" where ")
    assert f"`GRPOTrainer.{method}` takes" in taken
    assert repr(dropped) not in taken and repr(dropped) in expected


def test_a_parameter_that_is_new_is_named_where_all_are_passed_on_by_name():
    replaced = edited("_compute_loss")
    parameter = inspect.Parameter("num_items", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(replaced)
    replaced.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])
    (change,) = upstream_changes(trainer_with(_compute_loss=replaced))
    assert "`GRPOTrainer._compute_loss` takes ['model', 'inputs', 'num_items'] where" in change


@pytest.mark.parametrize(("method", "attribute"), ATTRIBUTES)
def test_an_attribute_that_a_method_no_longer_uses_is_named(method, attribute):
    replaced = edited(method, co_names=lambda code: tuple("renamed" if n == attribute else n for n in code.co_names))
    changes = upstream_changes(trainer_with(**{method: replaced}))
    assert changes == [f"`GRPOTrainer.{method}` no longer uses `{attribute}`"]


@pytest.mark.parametrize(("method", "constant"), CONSTANTS)
def test_a_constant_that_a_method_no_longer_uses_is_named(method, constant):
    replaced = edited(method, co_consts=lambda code: without_constant(code, constant))
    changes = upstream_changes(trainer_with(**{method: replaced}))
    assert changes == [f"`GRPOTrainer.{method}` no longer uses {constant!r}"]


@pytest.mark.parametrize("variable", _trl._HEAD_VARIABLES.values())
def test_a_head_setting_that_is_gone_is_named(variable, monkeypatch):
    source = inspect.getsource(_trl.add_fused_lm_head).replace(variable, f"{variable}_renamed")
    namespace = dict(_trl.add_fused_lm_head.__globals__)
    exec(source, namespace)
    monkeypatch.setattr(_trl, "add_fused_lm_head", namespace["add_fused_lm_head"])
    assert upstream_changes() == [f"`add_fused_lm_head` no longer resolves `{variable}`"]


def test_a_called_function_that_takes_other_parameters_is_named(monkeypatch):
    monkeypatch.setitem(_trl._FUNCTIONS, "prepare_deepspeed", (lambda model: None, ["model", "accelerator"]))
    assert upstream_changes() == ["`prepare_deepspeed` takes ['model'] where ['model', 'accelerator'] were expected"]


def test_all_changes_are_listed_with_the_version_and_the_way_out():
    trainer = trainer_with(_compute_loss=edited("_compute_loss", co_names=lambda code: ()))
    del trainer._tokenize_prompts
    with pytest.raises(ImportError) as error:
        check_upstream(trainer)
    lines = str(error.value).splitlines()
    assert _trl.trl.__version__ in lines[0] and "pip install 'trl>=1.16,<1.17'" in lines[-1]
    assert len([line for line in lines if line.startswith("- `GRPOTrainer._compute_loss`")]) == 7
    assert "- `GRPOTrainer._tokenize_prompts` is gone" in lines


def test_the_head_settings_are_what_trl_resolved(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.logit_scale, model.config.final_logit_softcapping = 0.25, 30.0
    _trl.add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=True)
    assert _trl.head_settings(model.forward) == (0.7, 0.25, 30.0, True)


def test_importing_the_package_beside_a_trl_that_differs_stops_with_the_difference():
    program = (
        "from trl import GRPOTrainer\n"
        "def _compute_loss(self, model, inputs, num_items_in_batch): ...\n"
        "GRPOTrainer._compute_loss = _compute_loss\n"
        "import trl_grpo_ext\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "ImportError: trl_grpo_ext extends TRL 1.16" in done.stderr
    assert "`GRPOTrainer._compute_loss` takes ['model', 'inputs', 'num_items_in_batch'] where" in done.stderr
    assert "is gone" not in done.stderr
