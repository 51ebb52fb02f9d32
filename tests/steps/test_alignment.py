"""Token ends on three real fast tokenizers and two slow ones, against what each token's bytes say."""

import logging

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
@settings(max_examples=120, deadline=None)
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


def _align(name, ids, window, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_WINDOW", window)
        patch.setattr(alignment, "_LONGEST_WINDOW", longest)
        return align_tokens(load_tokenizer(name), ids)


@pytest.mark.parametrize("name", [*FAST, "byt5"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_windows_give_what_every_beginning_gives(name, data):
    ids = data.draw(completions(name))
    # One window, in which every beginning is decoded
    expected = _align(name, ids, 10_000, 10_000)
    assert align_tokens(load_tokenizer(name), ids) == _align(name, ids, 7, 10_000) == expected
    # Where a window is too long, its characters end in its last token
    coarse = _align(name, ids, 4, 4)
    _check_ends(coarse, ids)
    assert coarse.text == expected.text


def _bytes_of(text):
    return [load_tokenizer("mistral").convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


# In each, windows of four tokens do not do
LONG = {
    "an emoji that is split after 8,192 bytes": ("mistral", lambda t: _bytes_of("😀" * 2048)[:-1]),
    "bytes with a wrong one, then text": (
        "mistral",
        lambda t: [
            *_bytes_of("中文" * 600),
            t.convert_tokens_to_ids("<0xFF>"),
            *t.encode("So x = 3.\n\n" * 300, add_special_tokens=False),
        ],
    ),
    "a byte tokenizer": ("byt5", lambda t: t.encode("naïve 答案 😀 x\n\n" * 300, add_special_tokens=False)),
    "spaces that are stripped": (
        "mistral-slow",
        lambda t: t.encode("a b\n中 " * 300 + " " * 3000 + "b c" * 300, add_special_tokens=False),
    ),
    "invalid bytes": ("qwen", lambda t: t.convert_tokens_to_ids(["ä", "¸"]) * 2000),
}


@pytest.mark.parametrize("case", LONG)
def test_the_work_grows_as_the_number_of_tokens(case, monkeypatch):
    name, make = LONG[case]
    tokenizer = load_tokenizer(name)
    ids = make(tokenizer)
    decoded = []
    make_decoder = alignment._decoder

    def counting(tokenizer):
        decode = make_decoder(tokenizer)
        return lambda ids: decoded.append(len(ids)) or decode(ids)

    monkeypatch.setattr(alignment, "_decoder", counting)
    aligned = align_tokens(tokenizer, ids)
    _check_ends(aligned, ids)
    assert aligned.text == make_decoder(tokenizer)(ids)
    # A decoding of every beginning is half the square: 1,000 times the tokens and more
    assert sum(decoded) < 200 * len(ids)


def test_text_after_a_run_of_wrong_bytes_has_ends_of_its_own():
    tokenizer = load_tokenizer("mistral")
    run = [*_bytes_of("中文" * 40), tokenizer.convert_tokens_to_ids("<0xFF>")]
    ids = [*run, *tokenizer.encode("So x = 3.\n\nThen 答案 is 😀." * 5, add_special_tokens=False)]
    assert (
        align_tokens(tokenizer, ids).token_ends[len(run) :]
        == _align("mistral", ids, 10_000, 10_000).token_ends[len(run) :]
    )


def test_a_tokenizer_that_cannot_be_decoded_in_parts_is_said_once(caplog):
    tokenizer = load_tokenizer("byt5")

    class Reversed(type(tokenizer)):
        def decode(self, ids, **options):
            return super().decode(list(ids)[::-1], **options)

    odd = Reversed()
    ids = tokenizer.encode("a" + "b" * 150, add_special_tokens=False)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        aligned = align_tokens(odd, ids)
    _check_ends(aligned, ids)
    assert "Reversed does not decode a part of a completion as it decodes the whole" in caplog.text


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
