"""The configuration: what it leaves alone, what it refuses, and how it comes in from a command line or a file."""

import json
import math
import pickle
import re
import warnings
from dataclasses import fields

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from trl_grpo_ext import GRPOExtConfig


DEFAULTS = {
    "supervision": "outcome",
    "advantage_estimator": "position",
    "position_baseline": "all",
    "gamma": 0.99,
    "gamma_unit": "token",
    "advantage_eps": 1e-4,
    "reward_transforms": None,
    "outcome_gate": None,
    "kl_estimator": "k3",
    "kl_direction": "reverse",
    "kl_reduction": "loss_type",
    "logits_memory_bytes": None,
    "prompt_separator": None,
    "reward_batch_tokens": None,
    "log_credit": 0,
}
COMMON = {"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none"}


def config(**changes):
    return GRPOExtConfig(**COMMON, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Fields
# ---------------------------------------------------------------------------------------------------------------------


def test_the_new_fields_and_their_defaults():
    added = {field.name for field in fields(GRPOExtConfig)} - {field.name for field in fields(GRPOConfig)}
    assert added == set(DEFAULTS)
    built = vars(config())
    assert {name: built[name] for name in DEFAULTS} == DEFAULTS


def test_the_fields_of_trl_keep_their_defaults():
    ours, trls = config().to_dict(), GRPOConfig(**COMMON).to_dict()
    assert {name: ours[name] for name in trls} == trls


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_documented(name):
    (field,) = [field for field in fields(GRPOExtConfig) if field.name == name]
    assert len(field.metadata["help"]) > 20
    entry = re.search(rf"^ +{name} \((.+?)\):\n( +\S.*\n)+", GRPOExtConfig.__doc__, re.MULTILINE)
    default = DEFAULTS[name]
    if default is None:
        assert "defaults to" not in entry[1]
    else:
        documented = re.search(r"defaults to `(.+)`", entry[1])[1].strip('"')
        assert documented == str(default) or float(documented) == default


# ---------------------------------------------------------------------------------------------------------------------
# Bad values
# ---------------------------------------------------------------------------------------------------------------------


def bad(name, value, shown=None):
    return pytest.param(name, value, repr(value) if shown is None else shown)


BAD_VALUES = [
    bad("supervision", "proces"),
    bad("supervision", None),
    bad("advantage_estimator", "max"),
    bad("advantage_estimator", ["position"]),
    bad("advantage_estimator", "no_such_module:row"),
    bad("kl_direction", "sideways"),
    bad("kl_direction", "no_such_module:row"),
    *(bad("beta", value) for value in (-0.1, math.nan, "0.1")),
    *(bad(name, value) for name in ("reward_transforms", "outcome_gate") for value in (5, True, [["none"]])),
    bad("position_baseline", "none"),
    *(bad("gamma", value) for value in (-0.01, 1.01, math.nan, math.inf, True, None, "0.9")),
    *(bad("gamma", value) for value in ([0.9, 1.5], [0.9, math.nan], [0.9, False], [[0.9, 0.8]])),
    bad("gamma", [], "empty"),
    bad("gamma_unit", "steps"),
    *(bad("advantage_eps", value) for value in (-1e-8, math.nan, math.inf, True, "1e-4")),
    *(
        bad("reward_transforms", ["none", name], repr(name))
        for name in ("unknown", "Center", "delta:1", "clip:", None)
    ),
    *(bad("reward_transforms", [name], repr(name)) for name in ("clip:abc", "clip:nan", "clip:-inf")),
    bad("kl_estimator", "k4"),
    bad("kl_estimator", ["exact"]),
    bad("kl_reduction", "mean"),
    bad("prompt_separator", "", "empty"),
    bad("prompt_separator", 5),
    *(bad("logits_memory_bytes", value) for value in (0, -1, 1e9)),
    bad("reward_batch_tokens", 0),
    bad("reward_batch_tokens", -1),
    *(bad("reward_batch_tokens", value) for value in (1.5, True, "64")),
    bad("importance_sampling_level", "sequences"),
    *(bad("reward_weights", value) for value in (["one"], [math.nan], [1.0, math.inf], {"a": 1.0}, [[1.0]], [True])),
]


@pytest.mark.parametrize(("name", "value", "shown"), BAD_VALUES)
def test_a_bad_value_is_refused_with_the_field_and_the_value(name, value, shown):
    with pytest.raises(ValueError) as error:
        config(**{"beta": 0.1, name: value})
    assert re.search(name.replace("_transforms", ".transforms?"), str(error.value))
    assert shown in str(error.value)


PROCESS = {"supervision": "process"}
BAD_COMBINATIONS = {
    "k1 without the ratio": (
        {"kl_estimator": "k1", "beta": 0.1, "use_bias_correction_kl": False},
        ["kl_estimator='k1'", "use_bias_correction_kl"],
    ),
    "sequence ratio with process": (
        {**PROCESS, "importance_sampling_level": "sequence"},
        ["importance_sampling_level='sequence'", "supervision='process'", "sequence_token"],
    ),
    "off-policy mask with process": (
        {**PROCESS, "off_policy_mask_threshold": 0.5},
        ["off_policy_mask_threshold", "supervision='process'"],
    ),
    "exact without beta": ({"kl_estimator": "exact"}, ["kl_estimator='exact'", "beta"]),
    "k1 without beta": ({"kl_estimator": "k1"}, ["kl_estimator='k1'", "beta"]),
    "k2 without beta": ({"kl_estimator": "k2"}, ["kl_estimator='k2'", "beta"]),
    "token_mean without beta": ({"kl_reduction": "token_mean"}, ["kl_reduction='token_mean'", "beta"]),
    "pooled sum with two gammas": (
        {**PROCESS, "advantage_estimator": "pooled", "gamma": [0.9, 1.0]},
        ["advantage_estimator='pooled'", "gamma", "[0.9, 1.0]", "normalize_then_sum"],
    ),
    "step sum with two gammas": (
        {**PROCESS, "advantage_estimator": "step", "gamma": [0.9, 1.0]},
        ["advantage_estimator='step'", "gamma", "[0.9, 1.0]", "normalize_then_sum"],
    ),
}


@pytest.mark.parametrize("combination", BAD_COMBINATIONS)
def test_a_combination_that_does_not_work_is_refused_with_the_way_out(combination):
    changes, named = BAD_COMBINATIONS[combination]
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k1", "beta": 0.1},
        {"kl_estimator": "k2", "beta": 0.1, "use_bias_correction_kl": False},
        {"kl_estimator": "exact", "beta": 0.1, "importance_sampling_level": "sequence"},
        {"kl_reduction": "token_mean", "beta": 0.1},
        {"importance_sampling_level": "sequence"},
        {**PROCESS, "importance_sampling_level": "sequence_token"},
        {**PROCESS, "advantage_estimator": "pooled", "gamma": [0.9, 0.9]},
        # A source of weight 0 is in no sum
        {**PROCESS, "advantage_estimator": "pooled", "gamma": [0.9, 1.0, 0.9], "reward_weights": [1.0, 0.0, 2.0]},
        {
            **PROCESS,
            "advantage_estimator": "step",
            "gamma": [0.9, 1.0],
            "multi_objective_aggregation": "normalize_then_sum",
        },
        {**PROCESS, "advantage_estimator": "min", "gamma": [0, 1]},
        {"advantage_eps": 0.0},
        {"reward_transforms": ["none", "center", "clip", "clip:0.3", "clip:-1e-2", "delta", "progress"]},
        {"reward_batch_tokens": 1, "prompt_separator": " "},
    ],
)
def test_the_neighbours_of_what_is_refused_are_taken_without_a_warning(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"gamma": 0.9}, {"gamma_unit": "step"}, {"advantage_estimator": "min"}, {"position_baseline": "active"}],
)
def test_a_process_field_without_process_supervision_warns_with_its_name(changes):
    (name,) = changes
    with pytest.warns(UserWarning, match=f"{name} only act.*supervision='process'"):
        config(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line, from a file, to a file
# ---------------------------------------------------------------------------------------------------------------------


def parse(*arguments):
    (parsed,) = TrlParser([GRPOExtConfig]).parse_args_and_config(
        ["--output_dir", "unused", "--bf16", "False", "--use_cpu", "True", "--beta", "0.1", *arguments]
    )
    return parsed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], DEFAULTS),
        (["--gamma", "0.9"], {"gamma": 0.9}),
        (["--gamma", "1"], {"gamma": 1.0}),
        (["--gamma", "0.9", "1.0"], {"gamma": [0.9, 1.0]}),
        (["--reward_transforms", "none", "clip:0.3"], {"reward_transforms": ["none", "clip:0.3"]}),
        (
            ["--kl_estimator", "exact", "--kl_reduction", "token_mean", "--advantage_eps", "1e-8"],
            {"kl_estimator": "exact", "kl_reduction": "token_mean", "advantage_eps": 1e-8},
        ),
        (
            ["--reward_batch_tokens", "4096", "--prompt_separator", "<sep>"],
            {"reward_batch_tokens": 4096, "prompt_separator": "<sep>"},
        ),
        (
            ["--supervision", "process", "--advantage_estimator", "min", "--gamma_unit", "step"],
            {"supervision": "process", "advantage_estimator": "min", "gamma_unit": "step"},
        ),
    ],
)
def test_the_command_line_is_read(arguments, expected):
    parsed = vars(parse("--position_baseline", "all", *arguments))
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--supervision", "token"],
        ["--position_baseline", "ended"],
        ["--gamma_unit", "word"],
        ["--kl_estimator", "k4"],
        ["--kl_reduction", "mean"],
        ["--gamma", "high"],
        ["--reward_batch_tokens", "1.5"],
    ],
)
def test_the_command_line_refuses_what_is_not_a_choice(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in error and repr(arguments[1]) in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gamma: 0.9", {"gamma": 0.9}),
        ("gamma: 1", {"gamma": 1.0}),
        ("gamma: [0.9, 1]", {"gamma": [0.9, 1.0]}),
        ("gamma: [0.9]", {"gamma": 0.9}),
        ("reward_transforms: [none, 'clip:0.3']", {"reward_transforms": ["none", "clip:0.3"]}),
        ("reward_transforms:\n- delta\n", {"reward_transforms": ["delta"]}),
        ("advantage_eps: 1e-8", {"advantage_eps": 1e-8}),
        ("supervision: process\nadvantage_estimator: step", {"supervision": "process", "advantage_estimator": "step"}),
        ('prompt_separator: "\\n"', {"prompt_separator": "\n"}),
        ("reward_batch_tokens: 4096", {"reward_batch_tokens": 4096}),
    ],
)
def test_a_yaml_file_is_read_and_the_command_line_overrides_it(text, expected, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    parsed = vars(parse("--config", str(file)))
    assert {name: parsed[name] for name in expected} == expected
    assert parse("--config", str(file), "--gamma", "0.25").gamma == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma: 1.5", "gamma .*1.5"),
        ("gamma: [0.5, high]", "gamma .*high"),
        ("supervision: token", "supervision .*'token'"),
        ("kl_estimator: k4", "kl_estimator .*'k4'"),
        ("reward_transforms: [clip, sharpen]", "'sharpen'"),
    ],
)
def test_a_yaml_file_with_a_bad_value_is_refused(text, message, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))


CHANGED = {
    **{name: value for name, value in DEFAULTS.items() if name in ("position_baseline", "advantage_estimator")},
    "supervision": "process",
    "gamma": [0.9, 1.0],
    "gamma_unit": "step",
    "advantage_eps": 1e-8,
    "reward_transforms": ["none", "clip:0.3"],
    "kl_estimator": "exact",
    "kl_reduction": "token_mean",
    "prompt_separator": "\n",
    "reward_batch_tokens": 64,
    "logits_memory_bytes": 10**8,
}


def test_it_survives_json_dict_and_pickle():
    changed = config(beta=0.1, **CHANGED)
    for restored in (
        json.loads(changed.to_json_string()),
        changed.to_dict(),
        vars(pickle.loads(pickle.dumps(changed))),
    ):
        assert {name: restored[name] for name in CHANGED} == CHANGED


def test_a_dictionary_of_its_fields_builds_it_again():
    (again,) = HfArgumentParser(GRPOExtConfig).parse_dict({**COMMON, "beta": 0.1, **CHANGED})
    assert {name: vars(again)[name] for name in CHANGED} == CHANGED


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gama": 0.9}, TypeError, "GRPOExtConfig has no field 'gama'; did you mean 'gamma'"),
        ({"loss_type": "gspo"}, ValueError, "For GSPO set importance_sampling_level='sequence'"),
    ],
)
def test_a_mistaken_name_is_met_with_the_right_one(changes, error, message):
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}])
def test_checkpointing_is_trls_without_a_word_of_its_new_name(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trls = GRPOConfig(**COMMON, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        ours = config(**changes)
    assert ours.gradient_checkpointing == trls.gradient_checkpointing == (changes == {})
    assert ours.to_dict().get("activation_checkpointing") == trls.to_dict().get("activation_checkpointing")


def test_a_single_weight_may_stand_without_a_list():
    assert config(reward_weights=0.5).reward_weights == [0.5]
    # The command line brings texts
    assert config(reward_weights=["1.0", "linear:1:0.5"]).reward_weights == [1.0, "linear:1:0.5"]


def test_a_subclass_may_take_arguments_that_are_no_fields():
    class Named(GRPOExtConfig):
        def __init__(self, run, **fields):
            super().__init__(output_dir=run, **fields)

    assert Named(run="first", bf16=False, use_cpu=True, gamma=0.5, supervision="process").output_dir == "first"
    with pytest.raises(TypeError, match="has no field 'gama'|unexpected keyword argument 'gama'"):
        Named(run="first", gama=0.5)
