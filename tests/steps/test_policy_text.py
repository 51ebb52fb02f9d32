"""The problem and the completion as texts, out of what TRL gives to reward functions."""

import pytest

from trl_grpo_ext.steps.policy_text import assistant_text, last_user_text


def user(content):
    return {"role": "user", "content": content}


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "image": None}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("P", "P"),
        ("", ""),
        (
            [user("before"), {"role": "assistant", "content": "A"}, user("P"), {"role": "assistant", "content": "{"}],
            "P",
        ),
        ([user("")], ""),
        ([user([text("P")])], "P"),
        ([user([text("What is "), text("1 + 1?")])], "What is 1 + 1?"),
        ([user([IMAGE, text("What is this?")]), user([text("P")])], "P"),
    ],
)
def test_the_problem_is_the_text_of_the_last_user_message(prompt, problem):
    assert last_user_text(prompt) == problem


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "system", "content": "S"}], "there is none in the prompt"),
        ([user(None)], "there is none in the prompt"),
        ([user([])], "there is none in the prompt"),
        (
            [user([IMAGE, text("What is this?"), IMAGE, {"type": "audio"}])],
            "also has parts of type image, audio. Reward models",
        ),
    ],
)
def test_a_problem_that_is_not_text_is_refused_with_what_it_is(prompt, message):
    with pytest.raises(ValueError, match=message):
        last_user_text(prompt)


def test_a_completion_is_the_texts_of_the_assistant_s_messages():
    completion = [
        {"role": "assistant", "content": [text("a"), IMAGE, text("b")]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "c"},
    ]
    assert assistant_text(completion) == "ab\n\nc"
    assert assistant_text("plain") == "plain"
