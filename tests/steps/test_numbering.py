"""Numbered steps, and pieces that say nothing by themselves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.steps.headings import says_something
from trl_grpo_ext.steps.segmentation import Segmentation, split_text


def steps_of(text, by="step_number", **options):
    return [text[start:end].strip() for start, end in split_text(text, Segmentation(by, **options))]


LABELS = [
    *(
        "Step {}:",
        "Step {}.",
        "Step {}：",
        "step {} :",
        "**Step {}:**",
        "**Step {}**:",
        "### Step {}",
        "### Step {}: ",
    ),
    *(
        "**Step {}** -",
        "- Step {}:",
        "> Step {}:",
        "Step {})",
        "Step #{}:",
        "步骤{}：",
        "步骤 {}:",
        "第{}步，",
        "第{}步：",
    ),
    *(
        "ステップ{}：",
        "手順{}：",
        "الخطوة {}:",
        "\u200fالخطوة {}:",
        "Шаг {}.",
        "Schritt {}:",
        "Étape {} :",
        "Étape\u00a0{}\u00a0:",
        "{}단계:",
    ),
    *("Step {} (a new start):", "**Step {} (a new start):**", "Step {}（开始）：", "Step {}/12:", "Step {} of 12:"),
    *("Step {} [a new start]:", "(Step {})", "[Step {}]", "**[Step {}]**", "Step {};"),
    *("{}.", "{})", "**{}.**", "**{}**.", "### {}.", "({})", "{}、", "{}:", "{}-"),
]


@pytest.mark.parametrize("label", LABELS)
def test_each_way_to_number_steps_is_found(label):
    steps = [f"{label.format(k)} we have 1.5 apples and (2) more\nin 2024. That is 3." for k in range(1, 13)]
    assert steps_of("\n".join(steps)) == steps
    assert steps_of("Let us see.\n\n" + "\n\n".join(steps)) == ["Let us see.", *steps]
    # Windows' line ends, and a word's number alone on its line
    assert len(steps_of("\r\n".join(steps))) == 12


@pytest.mark.parametrize(
    ("digits", "label"), [("٠١٢٣٤٥٦٧٨٩", "الخطوة {}:"), ("٠١٢٣٤٥٦٧٨٩", "{}."), ("０１２３４５６７８９", "{}．")]
)
def test_numbers_in_other_digits_count_too(digits, label):
    steps = [f"{label.format(digits[k])} x" for k in range(1, 4)]
    assert steps_of("\n".join(steps)) == steps


def test_chinese_numerals():
    steps = ["第一步：求和", "第二步，相乘", "第十二步 得出"]
    assert steps_of("\n".join(steps)) == steps
    assert steps_of("步骤一：求和\n步骤二：相乘") == ["步骤一：求和", "步骤二：相乘"]


@pytest.mark.parametrize(
    "text",
    [
        "We need two things: 1. apples, 2. pears and 3. plums.",
        "1.5 apples\n2.5 pears",
        "2024. It was so\n2025. It was not",
        "12. March\n13. March",
        "1. Only one point",
        "Text\n1. Only one point",
        "3. three\n4. four",
        "1. one\n3. three",
        "1:30 to\n2:45",
        "Step one: a\nStep 2 gives b\nSteps 3 and 4: c",
        "As in\nfootstep 1: x\nStepwise 2: y",
        "-1. x\n= 2. y",
        "```\n1. a\n2. b\n```",
    ],
)
def test_what_is_no_step(text):
    assert steps_of(text) == [text]


def test_a_list_within_a_step_is_none():
    steps = ["1. Two cases:\n   1. a\n   2. b\n   3. c", "2. Then\n1) x\n2) y", "3. End"]
    assert steps_of("\n".join(steps)) == steps
    worded = ["Step 1: Two cases:\n1. a\n2. b", "Step 2: End"]
    assert steps_of("\n".join(worded)) == worded
    # A plan, and then the steps
    again = ["1. plan", "2. more", "1. do", "2. check"]
    assert steps_of("\n".join(again)) == again


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["x = 1.5", "In 2024. It", "so (1) and (2)", "a 1. b 2. c", "27. March"]), max_size=3),
    st.integers(2, 6),
    st.sampled_from(["{}. ", "Step {}: ", "**{}.** "]),
)
def test_numbers_within_lines_change_nothing(lines, count, label):
    steps = ["\n".join([label.format(k) + "begin", *lines]) for k in range(1, count + 1)]
    assert steps_of("\n".join(steps)) == steps


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that say nothing by themselves
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece",
    [
        "---",
        "***",
        "$$",
        "\\[",
        "✅",
        "…",
        "### Solution",
        "# Step 1: Add",
        "Step 3:",
        "Step 3",
        "**Step 3:**",
        "步骤1：",
        "2.",
        "**2.**",
    ]
    + [
        "**Solution**",
        "**Solution:**",
        "**Step 3: Add 1 and 2**",
        "### Step 1\n---",
        "> ## Quote",
        "1)",
        "第一步：",
        "الخطوة 2:",
    ],
)
def test_these_say_nothing_by_themselves(piece):
    assert not says_something(piece)
    assert steps_of(f"a\n\n{piece}\n\nb", "blank_line") == ["a", f"{piece}\n\nb"]
    assert steps_of(f"a\n\n{piece}", "blank_line") == [f"a\n\n{piece}"]
    assert steps_of(f"a\n\n{piece}\n\nb", "blank_line", join_headings=False) == ["a", piece, "b"]


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "42",
        "-12",
        "= 12.",
        "**42**",
        "**So x = 5.**",
        "Step 3: add",
        "### Step 3\nAdd.",
        "#1 is it",
        "解",
        "x:",
        "**a** b",
        "1. a",
    ],
)
def test_these_do(piece):
    assert says_something(piece)
    assert steps_of(f"a\n\n{piece}\n\nb", "blank_line") == ["a", piece, "b"]


def test_headings_alone_are_one_step():
    assert steps_of("---\n\n### Step 1", "blank_line") == ["---\n\n### Step 1"]
    assert steps_of("### Step 1\n\n### Step 2: Add\n\nx", "blank_line") == ["### Step 1\n\n### Step 2: Add\n\nx"]


def test_the_user_s_own_cuts_are_left_as_they_are():
    assert steps_of("a;---;b", "regex:;") == ["a;", "---;", "b"]
    assert steps_of("a---b", lambda text: [1, 4]) == ["a", "---", "b"]
