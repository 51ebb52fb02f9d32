"""Token ends on three real fast tokenizers and two slow ones, against what each token's bytes say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import FAST, REPLACEMENT, characters, completions, load_tokenizer
from trl_grpo_ext.steps import alignment
from trl_grpo_ext.steps.alignment import align_tokens, end_token, strip_special


# In one process with the other tests of real tokenizers, which take seconds to load
pytestmark = pytest.mark.xdist_group("tokenizers")


def _check_ends(aligned, ids):
    assert len(aligned.token_ends) == len(ids)
    assert aligned.token_ends == sorted(aligned.token_ends)
    assert all(0 <= end <= len(aligned.text) for end in aligned.token_ends)
    assert not ids or aligned.token_ends[-1] == len(aligned.text)


@pytest.mark.parametrize("name", [*FAST, "byt5"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_each_character_ends_in_the_token_with_its_last_byte(name, data):
    ids = data.draw(completions(name))
    aligned = align_tokens(load_tokenizer(name), ids)
    _check_ends(aligned, ids)
    expected = characters(name, ids)
    assert aligned.text == "".join(character.text for character in expected)
    following = [character.last for character in expected[1:]] + [len(ids)]
    for position, (character, first, last) in enumerate(expected):
        token = end_token(aligned.token_ends, position + 1)
        if character == REPLACEMENT:
            # It may start before its last byte, and tokens without text may seem to go on with it
            assert first <= token <= max(last, following[position] - 1)
        else:
            assert token == last


@pytest.mark.parametrize("name", ["smollm2", "deepseek"])
def test_invalid_bytes_end_where_the_next_token_shows_it(name):
    tokenizer = load_tokenizer(name)
    # The bytes 61, E4, B8: the last two begin a character of three bytes
    ids = tokenizer.convert_tokens_to_ids(["a", "ä", "¸"])
    assert align_tokens(tokenizer, ids) == ("a\ufffd", [1, 1, 2])
    assert align_tokens(tokenizer, [*ids, ids[0]]) == ("a\ufffda", [1, 1, 2, 3])
    assert align_tokens(tokenizer, [*ids, ids[1], ids[1]]) == ("a\ufffd\ufffd\ufffd", [1, 1, 2, 3, 4])


def test_a_slow_tokenizer_that_strips_what_it_decodes_is_exact_too():
    tokenizer = load_tokenizer("mistral-slow")

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.integers(0, len(tokenizer) - 1) | st.sampled_from(tokenizer.encode("a  b 中\n😀")), max_size=30)
    )
    def check(ids):
        aligned = align_tokens(tokenizer, ids)
        _check_ends(aligned, ids)
        pieces = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids)]
        whole = "".join(pieces)
        assert aligned.text == whole.strip()
        owners = [token for token, piece in enumerate(pieces) for _ in piece][len(whole) - len(whole.lstrip()) :]
        for position, character in enumerate(aligned.text):
            if not character.isspace():
                assert end_token(aligned.token_ends, position + 1) == owners[position]

    check()


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_window_changes_nothing(name, data):
    ids = data.draw(completions(name))
    expected = align_tokens(load_tokenizer(name), ids)
    for window in (1, 2, 7, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alignment, "_WINDOW", window)
            assert align_tokens(load_tokenizer(name), ids) == expected, window


@pytest.mark.parametrize("name", FAST)
def test_windows_alone_align_valid_text(name, monkeypatch):
    # Otherwise every completion is decoded once per token, which is right but slow
    tokenizer = load_tokenizer(name)
    text = "Let $x$ be 3.\n\n解：因为 😀👩‍👩‍👧‍👦\n\n\n  so\t\\[ x^2 \\]\n" * 5
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert alignment._align_windows(tokenizer.decode, ids) == align_tokens(tokenizer, ids)
    assert align_tokens(tokenizer, ids).text == text


@pytest.mark.parametrize("name", [*FAST, "byt5"])
def test_special_tokens_at_the_end_are_no_part_of_the_completion(name):
    tokenizer = load_tokenizer(name)
    special = tokenizer.all_special_ids
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert strip_special(tokenizer, [*ids, *special, *special]) == ids
    assert strip_special(tokenizer, [special[0], *ids]) == [special[0], *ids]
    assert strip_special(tokenizer, special) == strip_special(tokenizer, []) == []


def test_nothing_aligns_with_nothing():
    assert align_tokens(load_tokenizer("byt5"), []) == ("", [])
