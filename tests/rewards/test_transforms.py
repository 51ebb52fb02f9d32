"""Reward transforms against their formulas, and their properties."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext import StepRewards
from trl_grpo_ext.rewards.transforms import parse_transform, transform_reward


WHERE = "reward source 'judge', completion 7"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [0.25, 1.0, 0.5]),
        ("center", [-0.5, 1.0, 0.0]),
        ("clip", [-0.25, 0.0, 0.0]),
        ("clip:0.75", [-0.5, 0.0, -0.25]),
        ("clip:-0.5", [0.0, 0.0, 0.0]),
        ("delta", [-0.75, 0.5, 0.0]),
        ("progress", [0.25, 0.75, -0.5]),
    ],
)
def test_worked_examples_of_transforms(name, expected):
    assert parse_transform(name)([0.25, 1.0, 0.5]) == expected
    steps = transform_reward(StepRewards([1, 3, 4], [0.25, 1.0, 0.5]), name, WHERE)
    assert steps == StepRewards([1, 3, 4], expected)
    assert transform_reward(None, name, WHERE) is None
    if name in ("delta", "progress"):
        with pytest.raises(ValueError, match=f"^{WHERE}: transform '{name}' compares steps"):
            transform_reward(0.25, name, WHERE)
    else:
        assert transform_reward(0.25, name, WHERE) == expected[0]


probabilities = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


@settings(deadline=None)
@given(probabilities)
def test_progress_adds_up_to_the_last_value_however_many_steps(values):
    assert math.fsum(parse_transform("progress")(values)) == pytest.approx(values[-1], abs=1e-12)


@settings(deadline=None)
@given(probabilities)
def test_delta_to_go_is_the_distance_to_the_last_value(values):
    transformed = parse_transform("delta")(values)
    assert transformed[-1] == 0.0
    for step, value in enumerate(values):
        assert math.fsum(transformed[step:]) == pytest.approx(value - values[-1], abs=1e-12)


@settings(deadline=None)
@given(probabilities, st.floats(-2, 2))
def test_clip_never_pays_for_a_step(values, threshold):
    for value, clipped in zip(values, parse_transform(f"clip:{threshold!r}")(values), strict=True):
        assert clipped == (0.0 if value >= threshold else value - threshold) <= 0.0


@settings(deadline=None)
@given(probabilities)
def test_center_is_odd_about_one_half(values):
    centred = parse_transform("center")(values)
    assert all(-1.0 <= value <= 1.0 for value in centred)
    mirrored = parse_transform("center")([1.0 - value for value in values])
    assert mirrored == pytest.approx([-value for value in centred], abs=1e-12)
