"""Thinking and answer: where each is, and which steps a scope leaves."""

import copy
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import hub_folders
from trl_grpo_ext import StepRewards, step_reward
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.steps.policy_text import policy_steps
from trl_grpo_ext.steps.segmentation import Segmentation, as_segmentation, split_text
from trl_grpo_ext.steps.thinking import THINKING_TAGS


R1 = "<think>\nOkay, 3 * 4 = 12.\n\nSo 10.\n</think>\n\nMultiply: 12.\n\nThe answer is 10."
SKY = R1.replace("<think>", "<|begin_of_thought|>").replace("</think>", "<|end_of_thought|>")
THOUGHT = ["Okay, 3 * 4 = 12.", "So 10."]
ANSWER = ["Multiply: 12.", "The answer is 10."]
OSS = (
    "<|channel|>analysis<|message|>Okay, 3 * 4 = 12.\n\nSo 10.<|end|><|start|>assistant<|channel|>final<|message|>"
    "Multiply: 12.\n\nThe answer is 10."
)


def steps_in_scope(text, scope, is_open=False, **options):
    cut = Segmentation(scope=scope, **options)
    parts = [text[start:end] for start, end in cut.in_scope(text, is_open)]
    return [part[start:end].strip() for part in parts for start, end in split_text(part, cut)]


@pytest.mark.parametrize(
    ("text", "is_open", "thinking", "answer"),
    [
        (R1, False, THOUGHT, ANSWER),
        (SKY, False, THOUGHT, ANSWER),
        # The generation prompt of the chat template has opened it
        (R1.removeprefix("<think>\n"), False, THOUGHT, ANSWER),
        (R1.removeprefix("<think>\n"), True, THOUGHT, ANSWER),
        # Cut off while the policy thinks
        (R1[: R1.index("</think>")], False, THOUGHT, []),
        (R1[len("<think>") : R1.index("</think>")], True, THOUGHT, []),
        ("\n\n".join(ANSWER), False, [], ANSWER),
        ("<think>\n\n</think>\n\n" + "\n\n".join(ANSWER), False, [], ANSWER),
        # A policy that opens what the prompt has opened
        (R1, True, ["<think>\nOkay, 3 * 4 = 12.", "So 10."], ANSWER),
        # Tags of the answer are text
        (R1 + " </think> is a tag.", False, THOUGHT, [ANSWER[0], ANSWER[1] + " </think> is a tag."]),
        (R1 + "\n\nA <think> tag.\n\nEnd.", False, THOUGHT, [*ANSWER, "A <think> tag.", "End."]),
        ("<think>a</think>\n\nb\n\n<think>c\n\nd</think>e", False, ["a", "c", "d"], ["b", "e"]),
        # Another model's closing tag closes nothing
        ("<think>a</thought>\n\nb</think>c", False, ["a</thought>", "b"], ["c"]),
        ("", True, [], []),
    ],
)
def test_worked_examples(text, is_open, thinking, answer):
    assert steps_in_scope(text, "thinking", is_open) == thinking
    assert steps_in_scope(text, "answer", is_open) == answer
    everything = [text[start:end].strip() for start, end in split_text(text, Segmentation())]
    assert steps_in_scope(text, "all", is_open) == steps_in_scope(text, None, is_open) == everything


def test_the_answer_of_gpt_oss_is_another_channel():
    assert steps_in_scope(OSS, "answer") == ANSWER
    assert steps_in_scope(OSS, "thinking")[0] == THOUGHT[0]


def test_tags_of_one_s_own_and_a_callable():
    text = R1.replace("think>", "plan>")
    assert steps_in_scope(text, "answer") == text.split("\n\n")
    tags = [["<plan>", "</plan>"]]
    assert as_segmentation({"scope": "answer", "thinking": tags}) == Segmentation(
        scope="answer", thinking=(("<plan>", "</plan>"),)
    )
    assert steps_in_scope(text, "answer", thinking=tags) == ANSWER
    assert steps_in_scope(text, "answer", thinking=lambda text: [(0, text.index("Multiply"))]) == ANSWER
    assert steps_in_scope("a. b", "thinking", thinking=lambda text: [(0, 2)]) == ["a."]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", "b c", "\n\n", "\n", " "]), st.sampled_from(THINKING_TAGS).flatmap(st.sampled_from)
        ),
        max_size=12,
    ).map("".join),
    st.booleans(),
)
def test_each_character_is_thinking_or_answer_or_a_tag(text, is_open):
    cut = Segmentation()
    thinking = cut.find_thinking(text, is_open)
    answer = Segmentation(scope="answer").in_scope(text, is_open)
    covered = sorted([*(part.whole for part in thinking), *answer])
    assert "".join(text[start:end] for start, end in covered) == text
    for whole, inner in thinking:
        assert whole.start <= inner.start <= inner.end <= whole.end
        tags = [text[whole.start : inner.start], text[inner.end : whole.end]]
        assert all(tag == "" or tag in [known for pair in THINKING_TAGS for known in pair] for tag in tags)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "answers"}, ValueError, "scope is 'answers'; known: all, answer, thinking"),
        ({"thinking": "<think>"}, TypeError, "thinking holds '<think>'; expected an opening and a closing tag"),
        ({"thinking": [("a",)]}, TypeError, r"thinking holds \('a',\)"),
        (
            {"thinking": [("", "b")]},
            ValueError,
            r"thinking holds \('', 'b'\); the two tags must differ and not be empty",
        ),
        ({"thinking": []}, ValueError, "thinking holds no tags"),
        ({"join_headings": 1}, TypeError, "join_headings is 1; expected true or false"),
    ],
)
def test_a_bad_scope_is_refused_when_the_segmentation_is_made(options, error, message):
    with pytest.raises(error, match=f"^Segmentation: {message}"):
        Segmentation(**options)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (3, TypeError, "returned 3; expected a list"),
        ([5], TypeError, "part 0 = 5"),
        ([(0, "a")], TypeError, "part 0"),
        ([(0, 2), (1, 3)], ValueError, "after 2"),
        ([(0, 9)], ValueError, "text of 3 characters"),
    ],
)
def test_a_callable_that_finds_no_parts_of_the_text_is_refused(returned, error, message):
    with pytest.raises(error, match=message):
        Segmentation(scope="answer", thinking=lambda text: returned).in_scope("abc")


# ---------------------------------------------------------------------------------------------------------------------
# On the policy's tokens
# ---------------------------------------------------------------------------------------------------------------------


def tokenizer_with_tags():
    """A tokenizer whose tags are special tokens: `skip_special_tokens` leaves them out of a text."""
    tokenizer = copy.deepcopy(hub_folders.byte_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


TOKENIZERS = {"text": hub_folders.byte_tokenizer, "special": tokenizer_with_tags}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def cut(tokenizer, ids, scope="answer", mask=None, **options):
    mask = None if mask is None else [mask]
    (steps,) = policy_steps(tokenizer, [ids], mask, Segmentation(scope=scope), "source", **options)
    return [(step.text, tokenizer.decode(ids[: step.last_token + 1]).rstrip()[-5:]) for step in steps]


def test_the_steps_of_a_scope_end_in_its_tokens(tokenizer):
    ids = [*encode(tokenizer, R1), tokenizer.eos_token_id]
    assert cut(tokenizer, ids) == [(step, step[-5:]) for step in ANSWER]
    assert cut(tokenizer, ids, "thinking") == [(step, step[-5:]) for step in THOUGHT]


def test_every_turn_thinks_for_itself(tokenizer):
    second = "<think>It says 7.\n\n</think>So 7."
    turns = [encode(tokenizer, text) for text in (R1, "tool: <think> 7\n\n", second)]
    mask = [own for own, turn in zip([1, 0, 1], turns, strict=True) for _ in turn]
    ids = sum(turns, [])
    assert [text for text, _ in cut(tokenizer, ids, mask=mask)] == [*ANSWER, "So 7."]
    assert [text for text, _ in cut(tokenizer, ids, "thinking", mask=mask)] == [*THOUGHT, "It says 7."]


def test_thinking_goes_on_behind_a_tool_until_it_is_closed(tokenizer):
    turns = [
        encode(tokenizer, text) for text in ("<think>Call it.", "7", "Still thinking.", "8", "So</think>It is 8.")
    ]
    mask = [own for own, turn in zip([1, 0, 1, 0, 1], turns, strict=True) for _ in turn]
    ids = sum(turns, [])
    assert [text for text, _ in cut(tokenizer, ids, mask=mask)] == ["It is 8."]
    assert [text for text, _ in cut(tokenizer, ids, "thinking", mask=mask)] == ["Call it.", "Still thinking.", "So"]


def test_what_stands_before_a_turn_may_have_opened_thinking(tokenizer):
    cut_off = encode(tokenizer, "Okay.\n\nThen")
    prompt = "<|im_start|>assistant\n<think>\n"
    assert [text for text, _ in cut(tokenizer, cut_off)] == ["Okay.", "Then"]
    for before in ({"prompts": [prompt]}, {"prompt_ids": [encode(tokenizer, prompt)]}):
        assert cut(tokenizer, cut_off, **before) == []
        assert [text for text, _ in cut(tokenizer, cut_off, "thinking", **before)] == ["Okay.", "Then"]
    # With enable_thinking=False templates write an empty thought
    closed = encode(tokenizer, prompt + "\n</think>\n\n")
    assert [text for text, _ in cut(tokenizer, cut_off, prompt_ids=[closed])] == ["Okay.", "Then"]
    # A later turn follows a tool's output and the template's generation prompt
    first = encode(tokenizer, "a</think>b")
    between = encode(tokenizer, "7" + prompt)
    ids = [*first, *between, *cut_off]
    mask = [1] * len(first) + [0] * len(between) + [1] * len(cut_off)
    assert [text for text, _ in cut(tokenizer, ids, mask=mask, prompt_ids=[encode(tokenizer, "?")])] == ["b"]


def test_a_closing_tag_at_the_end_of_a_cut_off_completion_is_seen(tokenizer):
    ids = encode(tokenizer, "Okay.\n\nThen</think>")
    assert cut(tokenizer, ids) == []
    assert [text for text, _ in cut(tokenizer, ids, "thinking")] == ["Okay.", "Then"]


def test_the_scope_is_reached_from_a_function_and_from_plain_data(tokenizer):
    given = []

    def judge(steps):
        given.append(steps)
        return [1.0] * len(steps)

    plain = {"by": "blank_line", "scope": "answer"}
    for by in (Segmentation(scope="answer"), plain):
        source = step_reward(judge, by=by)
        source.prepare(None, tokenizer, None)
        ids = encode(tokenizer, R1)
        (rewards,) = source(prompts=["?"], completion_ids=[ids])
        assert given.pop() == ANSWER
        first = encode(tokenizer, R1[: R1.index("The answer")])
        assert rewards == StepRewards([len(first) - 1, len(ids) - 1], [1.0, 1.0])
    fields = {
        "name": "p",
        "kind": "process",
        "rendering": {"type": "Tagged"},
        "reading": {"type": "TokenPair", "good": "+", "bad": "-"},
    }
    assert Preset.from_dict({**fields, "segmentation": plain}).segmentation == Segmentation(scope="answer")


def test_thinking_that_is_judged_by_default_is_said_once_by_name(tokenizer, caplog):
    logging.getLogger("transformers").propagate = True
    completion_ids = [encode(tokenizer, "no thinking"), encode(tokenizer, R1)]
    name = f"source {id(tokenizer)}"
    with caplog.at_level(logging.WARNING):
        for scope in ("all", "answer", "thinking"):
            policy_steps(tokenizer, completion_ids, None, Segmentation(scope=scope), name)
        assert name not in caplog.text
        for _ in range(2):
            policy_steps(tokenizer, completion_ids, None, Segmentation(), name)
    (message,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert "Segmentation(scope='answer') leaves thinking out" in message
