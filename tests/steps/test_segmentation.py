"""Steps of generated completions: what splits, what does not, and the token that ends each step."""

import re
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import FAST, PIECES, REPLACEMENT, characters, completions, load_tokenizer
from trl_grpo_ext import StepRewards
from trl_grpo_ext.rewards.types import parse_reward
from trl_grpo_ext.steps.alignment import AlignedText, align_tokens
from trl_grpo_ext.steps.segmentation import Segmentation, as_segmentation, segment, split_text


# In one process with the other tests of real tokenizers, which take seconds to load
pytestmark = pytest.mark.xdist_group("tokenizers")


def _every_third(text):
    return range(0, len(text), 3)


WAYS = ["blank_line", "newline", "step_number", "regex:[.。]\\s*", "regex:(?=So|解)", "regex:", _every_third]


def steps_of(text, by="blank_line", **options):
    return [text[start:end].strip() for start, end in split_text(text, Segmentation(by, **options))]


def one_token_each(text):
    return AlignedText(text, list(range(1, len(text) + 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Text to steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "text", "expected"),
    [
        ("blank_line", "", []),
        ("blank_line", " \n\n\t\n", []),
        ("blank_line", "a\nb", ["a\nb"]),
        ("blank_line", "\n\na\n\n\n \n\nb \n\n", ["a", "b"]),
        ("blank_line", "a\r\n\r\nb\n\u3000\nc", ["a", "b", "c"]),
        ("newline", "a\n \nb\nc\n", ["a", "b", "c"]),
        ("newline", "a\n\\[\nx\n\\]\nb", ["a", "\\[\nx\n\\]", "b"]),
        ("step_number", "Plan.\nStep 1: a\n\nb Step 9: \nstep 2: c", ["Plan.", "Step 1: a\n\nb Step 9:", "step 2: c"]),
        (
            "step_number",
            "## Step 1: a\n**Step 2**: b\n- Step 10 : c",
            ["## Step 1: a", "**Step 2**: b", "- Step 10 : c"],
        ),
        ("step_number", "Step one: a\nStep 2 b", ["Step one: a\nStep 2 b"]),
        ("regex:;|ки", "a; b ки c;", ["a;", "b ки", "c;"]),
        ("regex:(?=So)", "So a. So b", ["So a.", "So b"]),
        (lambda text: [2, 2, 4], "a b c", ["a", "b", "c"]),
        (lambda text: [], "a b c", ["a b c"]),
    ],
)
def test_worked_examples(by, text, expected):
    assert steps_of(text, by) == expected


@pytest.mark.parametrize("by", WAYS)
@settings(max_examples=150, deadline=None)
@given(text=st.lists(PIECES, max_size=10).map("".join))
def test_spans_cover_the_text_and_each_says_something(by, text):
    spans = split_text(text, Segmentation(by))
    assert bool(spans) == bool(text.strip())
    if spans:
        assert spans[0].start == 0 and spans[-1].end == len(text)
    assert all(left.end == right.start for left, right in pairwise(spans))
    assert all(text[start:end].strip() for start, end in spans)


@settings(max_examples=120, deadline=None)
@given(st.text("ab \t\r\n.\u3000中", max_size=40))
def test_reduces_to_paragraphs_without_maths_and_code(text):
    paragraphs = [piece.strip() for piece in re.split(r"\n[^\S\n]*\n", text) if piece.strip()]
    assert steps_of(text, join_headings=False) == paragraphs
    assert steps_of(text, "newline", join_headings=False) == [
        line.strip() for line in text.split("\n") if line.strip()
    ]


PROSE = st.sampled_from(
    [
        "So $x$ costs \\$3 and \\$$4.",
        "A row ends \\\\[2pt] here.",
        "Use ```x``` in a line.",
        "```x``` begins a line.",
        "中文 😀",
        "\\( y \\)",
        "- ~~no~~",
        "x \\] \\end{cases} y",
        "| a | b |",
        "<details> <b>x",
    ]
)
DECOYS = st.lists(st.sampled_from(["a", "\n", "\\\\[2pt]", "\\$", "解"]), max_size=6).map(
    lambda parts: "a" + re.sub("\n+", "\n", "".join(parts)) + "b"
)
MATHS = st.recursive(
    DECOYS,
    lambda inner: st.one_of(
        inner.map(lambda body: f"\\[{body}\n\\]"),
        st.tuples(st.sampled_from(["align*", "cases", "equation"]), inner, inner).map(
            lambda parts: f"\\begin{{{parts[0]}}}\n{parts[1]}\n{parts[2]}\\end{{{parts[0]}}}"
        ),
    ),
    max_leaves=4,
)
DISPLAYS = st.one_of(
    MATHS.map(lambda body: f"$$\n{body}$$"),
    MATHS.map(lambda body: f"so \\[\n{body}\\]."),
    MATHS.map(lambda body: f"\\begin{{align}}\n{body}\\end{{align}}"),
)
CODE = st.lists(
    st.sampled_from(["x = 1", "", " ", "$$", "\\[", "\\]", "\\begin{cases}", "~~~ a", "``", "echo ```a```"]),
    max_size=6,
).map("\n".join)
FENCED = st.one_of(
    CODE.map(lambda body: f"```python\n\n{body}\nx\n```"),
    CODE.map(lambda body: f"Here is the code: ```python\n{body}\n```"),
    CODE.map(lambda body: f"- item ```c++\n{body}\n  ```"),
    CODE.map(lambda body: f"Run:\n  ````\nx\n{body}\n```\n\n```\n  ````"),
    CODE.map(lambda body: f"~~~~\n\nx\n{body}\n```\n\n~~~~"),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(PROSE, FENCED), min_size=1, max_size=6), st.sampled_from(["\n\n", "\n \n", "\n\n\n"]))
def test_fenced_code_is_never_split(blocks, separator):
    assert steps_of(separator.join(blocks)) == blocks


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(PROSE, DISPLAYS), min_size=1, max_size=6))
def test_display_maths_of_one_paragraph_is_never_split(blocks):
    assert steps_of("\n\n".join(blocks), "newline") == blocks


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["$$", "\\[", "\\begin{align}", "```python", "~~~", "so \\[ x \\] and \\["]),
    st.lists(st.one_of(PROSE.filter(lambda prose: "\\]" not in prose), FENCED), max_size=4),
)
def test_what_is_never_closed_protects_nothing(opening, blocks):
    opening = f"see {opening}"
    assert steps_of("\n\n".join(["a", opening, *blocks])) == ["a", opening, *blocks]


# What a policy writes once too often, or forgets the partner of
STRAYS = [
    "$$",
    "$",
    "\\[",
    "\\]",
    "\\begin{align}",
    "\\end{align}",
    "\\begin{cases}",
    "```",
    "```python",
    "````",
    "~~~",
]
STRAYS += ["<div>", "</details>", "|", "</think>", "<think>"]
# Their fences stand at the beginning or the end of a paragraph, or name a language
WELL_FORMED = st.one_of(
    PROSE,
    DISPLAYS,
    st.sampled_from(
        [
            "```\na = 1\n\nb = 2\n```",
            "```python\na = 1\n\nb = 2\n```",
            "Code: ```python\na = 1\n\n\nb = 2\n```",
            "Output:\n```\n1\n\n2\n```",
            "1. ```c\nx;\n\ny;\n   ```",
            "~~~\na\n\nb\n~~~",
        ]
    ),
)


@pytest.mark.parametrize("by", ["blank_line", "newline"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_delimiter_too_many_changes_the_steps_of_its_own_paragraph_only(by, data):
    before, own, after = (data.draw(st.lists(WELL_FORMED, max_size=4)) for _ in range(3))
    own = ["x", *own[:1]][-1]
    stray = data.draw(st.sampled_from(STRAYS))
    place = data.draw(st.integers(0, len(own)))
    broken = own[:place] + data.draw(st.sampled_from([stray, f"\n{stray}\n", f" {stray}"])) + own[place:]
    # The words at both ends keep headings from being joined across the paragraph
    paragraphs = [["first", *before], ["begin " + broken + " end"], [*after, "last"]]
    steps = steps_of("\n\n".join("\n\n".join(part) for part in paragraphs), by)
    left, right = ([steps_of(part, by) for part in paragraphs[index]] for index in (0, 2))
    left, right = sum(left, []), sum(right, [])
    assert steps[: len(left)] == left
    assert steps[len(steps) - len(right) :] == right


TAGS = ["<extra_0>", " ки", "<|reserved_special_token_0|>", "+", "<|im_end|>", "</s>", "[SEP]"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(PROSE, FENCED), min_size=1, max_size=5), st.data())
def test_a_tag_in_the_text_adds_no_step(blocks, data):
    # Not behind a fence, which a tag would keep from closing
    blocks = [block for block in blocks if block[-1] not in "`~"]
    tagged = [block + "".join(data.draw(st.lists(st.sampled_from(TAGS), max_size=3))) for block in blocks]
    assert steps_of("\n\n".join(tagged)) == [block.strip() for block in tagged]


# ---------------------------------------------------------------------------------------------------------------------
# Steps to tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_each_step_ends_in_the_token_with_its_last_character(name, data):
    ids = data.draw(completions(name))
    by = data.draw(st.sampled_from(WAYS))
    aligned = align_tokens(load_tokenizer(name), ids)
    steps = segment(aligned, Segmentation(by))
    if steps:
        read = parse_reward(StepRewards([step.last_token for step in steps], [1.0] * len(steps)), len(ids), "steps")
        assert [step.last_token for step in steps] == read.ends
    held = characters(name, ids)
    last = [held[end - 1] for _, end in split_text(aligned.text, Segmentation(by))]
    if all(character.text != REPLACEMENT for character in last):
        assert [step.last_token for step in steps] == list(dict.fromkeys(character.last for character in last))
    # An invalid byte may stay open until the next token
    for step in steps:
        assert any(character.first <= step.last_token <= character.last for character in last)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_joined_steps_are_as_long_and_as_many_as_asked_and_lose_no_text(name, data):
    ids = data.draw(completions(name))
    by = data.draw(st.sampled_from([*WAYS, "tokens"]))
    shortest, most = data.draw(st.integers(1, 6)), data.draw(st.none() | st.integers(1, 4))
    aligned = align_tokens(load_tokenizer(name), ids)
    every = segment(aligned, Segmentation(by, window=3))
    steps = segment(aligned, Segmentation(by, window=3, min_step_tokens=shortest, max_steps=most))
    assert "".join("".join(step.text.split()) for step in steps) == "".join(aligned.text.split())
    assert {step.last_token for step in steps} <= {step.last_token for step in every}
    assert [step.last_token for step in steps[-1:]] == [step.last_token for step in every[-1:]]
    assert most is None or len(steps) <= most
    sizes = [right - left for left, right in pairwise([-1, *(step.last_token for step in steps)])]
    assert len(sizes) <= 1 or min(sizes) >= shortest


@pytest.mark.parametrize("name", FAST)
def test_tokens_up_to_the_ends_spell_the_steps(name):
    tokenizer = load_tokenizer(name)
    paragraphs = ["Let $x$ be 3 .", "\\[\nx^2 = 9\n\\]", "因为 😀", "```\na\n\nb\n```", "So \\boxed{9}."]
    ids = tokenizer.encode("\n\n".join(paragraphs), add_special_tokens=False)
    steps = segment(align_tokens(tokenizer, ids), Segmentation())
    assert [step.text for step in steps] == paragraphs
    pieces = [ids[left + 1 : right + 1] for left, right in pairwise([-1, *(step.last_token for step in steps)])]
    assert [tokenizer.decode(piece).strip() for piece in pieces] == paragraphs


def test_steps_that_end_in_one_token_are_one():
    aligned = AlignedText("a\n\nb\n\nc", [1, 6, 7])
    assert segment(aligned, Segmentation()) == [("a\n\nb", 1), ("c", 2)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("a", 2), ("bcde", 8), ("f", 11), ("g", 12)]),
        ({"min_step_tokens": 2}, [("a", 2), ("bcde", 8), ("f\n\ng", 12)]),
        ({"min_step_tokens": 4}, [("a\n\nbcde", 8), ("f\n\ng", 12)]),
        ({"min_step_tokens": 10}, [("a\n\nbcde\n\nf\n\ng", 12)]),
        ({"min_step_tokens": 99}, [("a\n\nbcde\n\nf\n\ng", 12)]),
        ({"max_steps": 4}, [("a", 2), ("bcde", 8), ("f", 11), ("g", 12)]),
        ({"max_steps": 2}, [("a", 2), ("bcde\n\nf\n\ng", 12)]),
        ({"max_steps": 1}, [("a\n\nbcde\n\nf\n\ng", 12)]),
        ({"min_step_tokens": 4, "max_steps": 2}, [("a\n\nbcde", 8), ("f\n\ng", 12)]),
        ({"by": "tokens", "window": 5}, [("a\n\nbc", 4), ("de\n\nf", 9), ("g", 12)]),
        ({"by": "tokens"}, [("a\n\nbcde\n\nf\n\ng", 12)]),
    ],
)
def test_worked_examples_of_joined_steps(options, expected):
    assert segment(one_token_each("a\n\nbcde\n\nf\n\ng"), Segmentation(**options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"by": "paragraph"},
            "unknown by='paragraph'; known: blank_line, newline, step_number, tokens, turn, regex:PATTERN",
        ),
        ({"by": "regex:("}, r"by='regex:\(' is not a regular expression"),
        ({"window": 0}, "window is 0"),
        ({"min_step_tokens": 0}, "min_step_tokens is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_a_bad_segmentation_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=f"^Segmentation: {message}"):
        Segmentation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": None}, "by is None; expected a text or a callable"),
        ({"by": 5}, "by is 5; expected a text or a callable"),
        ({"by": Segmentation}, "by is <class .*>; expected a text or a callable"),
        ({"window": "5"}, "window is '5'; expected a whole number"),
        ({"window": True}, "window is True; expected a whole number"),
        ({"window": 2.5, "by": "tokens"}, "window is 2.5; expected a whole number"),
        ({"min_step_tokens": None}, "min_step_tokens is None; expected a whole number"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected a whole number"),
    ],
)
def test_an_argument_of_another_type_is_refused_when_the_segmentation_is_made(options, message):
    with pytest.raises(TypeError, match=f"^Segmentation: {message}"):
        Segmentation(**options)


def test_what_a_user_means_by_a_segmentation():
    lines = Segmentation("newline")
    cut = str.split
    assert as_segmentation(lines) is lines
    assert as_segmentation("newline") == as_segmentation({"by": "newline"}) == lines
    assert as_segmentation(cut) == Segmentation(cut)
    with pytest.raises(TypeError, match="by is None"):
        as_segmentation(None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"the callable returned None; expected a list of character indices"),
        ("12", r"the callable returned '12'; expected a list"),
        ([1.5], r"ends\[0\] = 1.5; expected the index of a character"),
        ([1, None], r"ends\[1\] = None; expected the index"),
        (["a", "b"], r"ends\[0\] = 'a'; expected the index"),
    ],
)
def test_a_callable_that_returns_no_indices_is_refused(returned, message):
    with pytest.raises(TypeError, match=message):
        split_text("abc", Segmentation(lambda text: returned))


@pytest.mark.parametrize(
    "ends", [[1, 2], (1, 2), np.array([1, 2]), range(1, 3)], ids=["list", "tuple", "numpy", "range"]
)
def test_a_callable_may_return_any_list_of_indices(ends):
    for by in (lambda text: iter(ends), lambda text: ends):
        assert split_text("abc", Segmentation(by)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("ends", [[3, 2], [-1], [4]])
def test_a_callable_whose_ends_decrease_or_leave_the_text_is_refused(ends):
    with pytest.raises(ValueError, match=rf"ends\[{len(ends) - 1}\] = {ends[-1]} after .* 3 characters"):
        split_text("abc", Segmentation(lambda text: ends))


# ---------------------------------------------------------------------------------------------------------------------
# Texts in the shapes of real files
# ---------------------------------------------------------------------------------------------------------------------


def test_one_stray_display_delimiter_in_an_answer_of_31_steps():
    steps = [f"Line {k}: so\n$$\na_{k} = {k}\n$$" if k % 2 else f"Then a_{k} costs \\${k}." for k in range(31)]
    for place in range(0, 31, 5):
        broken = [step + " $$" if k == place else step for k, step in enumerate(steps)]
        assert steps_of("\n\n".join(broken)) == broken
    # A policy that would make one step of all
    assert len(steps_of("$$\n\n" + "\n\n".join(steps) + "\n\n$$")) == 31


@pytest.mark.parametrize(
    "steps",
    [
        ["Plan.", "Here is the code: ```python\nx = 1\n\nprint(x)\n```", "It prints 1.", "So\n```\n1\n```", "Done."],
        ["Plan.", "- Run ```python\n  x = 1\n\n  y = 2\n  ```", "- Then", "```\nz\n\nw\n```", "so", "End."],
        ["1. First:\n   ```python\n   x = 1\n\n   y = 2\n   ```", "2. Then", "3. Last ```sh\nls\n\nls\n```", "End"],
        ["> ```\n> a\n>\n> b\n> ```", "Text", "```python title=a.py\nx\n\ny\n```", "```{.python}\nx\n\ny\n```"],
        ["Never closed: ```python\nx = 1", "a", "```python\ny = 2\n\nz = 3\n```", "b", "~~~\nq", "c"],
        ["```python\nprint(1)```", "a", "b", "```python\nx\n\ny\n```"],
    ],
    ids=["after text", "in a list", "numbered", "quoted", "unclosed", "closed in a line"],
)
def test_code_in_the_shapes_that_policies_write(steps):
    assert steps_of("\n\n".join(steps)) == steps
    assert steps_of("\r\n\r\n".join(step.replace("\n", "\r\n") for step in steps)) == [
        step.replace("\n", "\r\n") for step in steps
    ]


def test_a_longer_fence_closes_nothing_and_holds_shorter_ones():
    assert steps_of("```\na\n\nb\n````\n\nc") == ["```\na", "b\n````", "c"]
    whole = "````markdown\n```python\nx\n\ny\n```\n\ntext\n````"
    assert steps_of(f"a\n\n{whole}\n\nb") == ["a", whole, "b"]


@pytest.mark.parametrize(
    "text",
    ["$$\n\n" * 10_000, "```\n\n" * 10_000, "```a\n\n" * 10_000, "``` " * 12_500, "x" * 25_000 + "``` " * 5_000]
    + ["\\begin{a}" * 5_000, "\\[" * 25_000, "```x " + "a=b=c " * 7_500 + "`", "step" + " " * 50_000, "-" * 50_000]
    + ["```" + " " * 25_000 + "x y"]
    + ["1. a\n" * 10_000, "**a" * 15_000, "\n" * 50_000, " \n" * 25_000, "<think>" * 7_500, "</think>\n\n" * 5_000]
    + ["".join("`" * k + "\nx\n\n" for k in range(3, 400)), "## a\n\n" * 10_000, "---\n" * 12_500],
    ids=lambda text: repr(text[:6]) + repr(text[-4:]),
)
def test_text_that_would_take_quadratic_time(text):
    start = time.process_time()
    for by in ("blank_line", "newline", "step_number"):
        segment(one_token_each(text), Segmentation(by, scope="answer"))
    # Linear time is below half a second; the square of 50,000 would be minutes
    assert time.process_time() - start < 5
