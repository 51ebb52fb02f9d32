"""Rendering with three real tokenizers: what is written, where it is read, and what a policy cannot forge."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hub_folders import (
    llama_tokenizer,
    load_tokenizer,
    missing_packages,
    qwen_tokenizer,
    save_mistral_tokenizer,
)
from tests.support.tokenizers import load_tokenizer as tokenizer_by_name
from trl_grpo_ext.reward_models.encoding import encode_text, one_id
from trl_grpo_ext.reward_models.renderings import Bare, Tagged, Turns


# In one process with the other tests of these tokenizers, which take seconds to load
pytestmark = [
    pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages())),
    pytest.mark.xdist_group("tokenizers of the Hub"),
]

TAGS = ["<extra_0>", " ки", "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "+", "\n", " \n\n\n\n"]
TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            [*TAGS, "\\frac{1}{2}", "$$x$$", "```py\nx = 1\n```", "🦩", "答案是", "Ответ", "é", " ", "\t"]
        ),
        st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁\x00\r\ufeff"), max_size=6),
    ),
    min_size=1,
    max_size=4,
).map("".join)
STEPS = st.lists(TEXT.map(lambda text: f"Step: {text.strip()} ."), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    save_mistral_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(mistral):
    return {"qwen": qwen_tokenizer(), "llama": llama_tokenizer(), "mistral": mistral}


QWEN = Tagged(tag="<extra_0>", chat=True, system="Be exact.")
SHEPHERD = Tagged(tag=" ки", first=" ", between="\n", bos=True)
LINES = Tagged(tag="\n", prompt="{problem}\n", bos=True)
EURUS = Bare(chat=True, after="\n\n", closing="first")
# As Math-Shepherd's training data has it, for a policy that does not number its steps
NUMBERED = Tagged(tag=" ки", first=" Step {number}: ", between="\nStep {number}: ", bos=True)
ASKED = Turns(after=" Is step {number} correct (Y/N)?", answer="Y")
PAIRS = [
    ("qwen", QWEN),
    ("mistral", SHEPHERD),
    ("llama", LINES),
    ("llama", Turns()),
    ("qwen", ASKED),
    ("qwen", EURUS),
    ("mistral", NUMBERED),
    ("mistral", Bare(prompt="Question:\n{problem}\n", bos=True, apart=True)),
]


def written(tokenizer, rendering, problem, steps):
    """The text that a rendering stands for, joined by hand, up to its last read position."""
    before = [rendering.first, *[rendering.between] * (len(steps) - 1)]
    steps = [before[n].replace("{number}", str(n + 1)) + step for n, step in enumerate(steps)]
    if isinstance(rendering, Tagged):
        body = "".join(step + rendering.tag for step in steps)
    else:
        body = rendering.after.join(steps)
    if not rendering.chat:
        return (tokenizer.bos_token or "") * rendering.bos + rendering.prompt.replace("{problem}", problem) + body
    turns = [("user", problem), ("assistant", body)]
    if isinstance(rendering, Turns):
        asked = [step + rendering.after.replace("{number}", str(n)) for n, step in enumerate(steps, start=1)]
        asked[0] = problem + asked[0]
        turns = [turn for text in asked for turn in (("user", text), ("assistant", rendering.answer))]
    if rendering.system is not None:
        turns.insert(0, ("system", rendering.system))
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # What ends the last message
    end = tokenizer.eos_token
    return text[: text.rindex(end)] + end * isinstance(rendering, Bare)


@pytest.mark.parametrize(("name", "rendering"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(problem=TEXT, steps=STEPS)
def test_a_rendering_writes_its_text_once_and_reads_each_step_once(tokenizers, name, rendering, problem, steps):
    tokenizer = tokenizers[name]
    ids, prompt_length, reads = rendering.render(tokenizer, problem, steps)
    assert len(reads) == len(steps) and all(a < b for a, b in zip(reads, reads[1:], strict=False))
    assert prompt_length <= reads[0] < len(ids)
    text = written(tokenizer, rendering, problem, steps)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if name == "mistral":
        # SentencePiece writes a space before a text of its own
        assert decoded.replace(" ", "") == text.replace(" ", "")
    else:
        assert decoded == text
    if isinstance(rendering, Tagged):
        assert {ids[read] for read in reads} == {one_id(tokenizer, rendering.tag, "tag")}
    if isinstance(rendering, Turns):
        assert {ids[read + 1] for read in reads} == {one_id(tokenizer, rendering.answer, "answer")}


@pytest.mark.parametrize(("name", "rendering"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(problem=TEXT, steps=STEPS, data=st.data())
def test_truncation_keeps_the_question_and_whole_steps(tokenizers, name, rendering, problem, steps, data):
    tokenizer = tokenizers[name]
    whole = rendering.render(tokenizer, problem, steps)
    length = data.draw(st.integers(1, len(whole.ids) + 1))
    cut = rendering.render(tokenizer, problem, steps, length)
    assert cut.prompt_length == whole.prompt_length
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert cut.score_positions == whole.score_positions[: len(cut.score_positions)]
    assert len(cut.ids) <= max(length, cut.prompt_length)
    kept = len(cut.score_positions)
    if kept < len(steps):
        following = rendering.render(tokenizer, problem, steps, 10**9).score_positions[kept]
        assert following >= length - (2 if isinstance(rendering, Turns) else 1)


@settings(max_examples=100, deadline=None)
@given(problem=TEXT, steps=STEPS)
def test_special_tokens_in_what_users_and_policies_write_stay_text(tokenizers, problem, steps):
    for name, rendering in (("qwen", QWEN), ("qwen", EURUS), ("llama", Turns()), ("mistral", SHEPHERD)):
        tokenizer = tokenizers[name]
        special = set(tokenizer.all_special_ids)
        ids, _, reads = rendering.render(tokenizer, problem, steps)
        plain, _, _ = rendering.render(tokenizer, "a", ["b"] * len(steps))
        assert [token for token in ids if token in special] == [token for token in plain if token in special]


def test_the_tags_and_answers_of_the_cards_are_these_ids(tokenizers):
    known = {
        ("qwen", "<extra_0>"): 151651,
        ("mistral", " ки"): 12902,
        ("mistral", " +"): 648,
        ("mistral", " -"): 387,
        ("llama", "+"): 10,
        ("llama", "-"): 12,
        ("llama", " \n\n\n\n"): 23535,
        ("qwen", " \n\n\n\n\n"): 76325,
        ("qwen", " +"): 488,
        ("qwen", " -"): 481,
    }
    assert {key: one_id(tokenizers[key[0]], key[1], "tag") for key in known} == known
    with pytest.raises(ValueError, match=r"the tag 'ки ки' must be one id in this tokenizer; it is \[1107, 12902\]"):
        one_id(tokenizers["mistral"], "ки ки", "tag")


def test_pieces_of_ordinary_text_are_the_ids_of_the_whole(tokenizers):
    problem, steps = "What is 2 + 3?", ["Step 1: 2 + 3 = 5.", "Step 2: The answer is 5."]
    mistral = tokenizers["mistral"]
    assert SHEPHERD.render(mistral, problem, steps).ids == mistral.encode(f"{problem} {steps[0]} ки\n{steps[1]} ки")
    llama = tokenizers["llama"]
    # One beginning-of-sequence token, though template and tokenizer both write one
    assert Turns().render(llama, problem, steps).ids.count(llama.bos_token_id) == 1
    assert LINES.render(llama, problem, steps).ids.count(llama.bos_token_id) == 1


def test_the_number_of_a_step_is_written_where_the_preset_says_and_nowhere_else(tokenizers):
    problem, steps = "What is 2 + {number}?", ["2 + 3 = {number}.", "So {number} it is."]
    mistral, qwen = tokenizers["mistral"], tokenizers["qwen"]
    text = "What is 2 + {number}? Step 1: 2 + 3 = {number}. ки\nStep 2: So {number} it is. ки"
    assert NUMBERED.render(mistral, problem, steps).ids == mistral.encode(text)
    bare = Bare(first=" {number})", between=" {number})", after=" [{number}]")
    text = "What is 2 + {number}? 1)2 + 3 = {number}. [1] 2)So {number} it is."
    assert bare.render(qwen, problem, steps).ids == qwen.encode(text)


def test_the_end_is_written_last_and_scored(tokenizers):
    llama = tokenizers["llama"]
    athene = Bare(chat=True, closing="all", end="{cls_token}<|eot_id|>")
    plain = Bare(chat=True, closing="all").render(llama, "2 + 3?", ["2 + 3", "= 5"])
    ids, _, reads = athene.render(llama, "2 + 3?", ["2 + 3", "= 5"])
    assert ids == [*plain.ids, 128003, 128009] and reads == [plain.score_positions[0], len(ids) - 1]
    athene.check(llama)
    with pytest.raises(ValueError, match=r"end is '\{sep_token\}', but this tokenizer has no sep_token"):
        Bare(end="{sep_token}").check(llama)


def test_a_template_tokenized_as_a_text_has_what_the_tokenizer_puts_before_texts(tokenizers):
    for name, start in (("llama", [128000]), ("qwen", [])):
        tokenizer = tokenizers[name]
        for rendering in (Bare(chat=True, closing="all"), Turns()):
            once = rendering.render(tokenizer, "2 + 3?", ["2 + 3", "= 5"])
            again = replace(rendering, as_text=True).render(tokenizer, "2 + 3?", ["2 + 3", "= 5"])
            assert again.ids == start + once.ids and again.prompt_length == len(start) + once.prompt_length


def test_contradictory_renderings_are_errors():
    with pytest.raises(ValueError, match="must say where {problem} goes"):
        Tagged(prompt="Question")
    with pytest.raises(ValueError, match="chat=True and bos=True"):
        Bare(chat=True, bos=True)
    with pytest.raises(ValueError, match="a system message needs chat=True"):
        Bare(system="Be exact.")
    with pytest.raises(ValueError, match="as_text=True .* needs chat=True"):
        Bare(as_text=True)
    with pytest.raises(ValueError, match="apart=True and prefixes=True"):
        Bare(apart=True, prefixes=True)


def test_a_separator_of_several_ids_is_read_at_its_last(tokenizers):
    qwen = tokenizers["qwen"]
    separator = encode_text(qwen, " ###\n---\n")
    assert len(separator) > 1
    ids, _, reads = Tagged(tag=" ###\n---\n", single=False).render(qwen, "a", ["b", "c"])
    assert ids == [*qwen.encode("a"), *qwen.encode("b"), *separator, *qwen.encode("c"), *separator]
    assert reads == [1 + len(separator), 2 + 2 * len(separator)]


def test_tokenizers_without_a_fast_implementation_render_too():
    problem, steps = "What is </s> 2 + 3?", ["2 + 3 = 5 </s> ки", "So <unk> it is\n5."]
    rendering = Tagged(tag=" ки", first=" ", between="\n")
    fast, slow = (tokenizer_by_name(name) for name in ("mistral", "mistral-slow"))
    assert fast.is_fast and not slow.is_fast
    assert rendering.render(slow, problem, steps) == rendering.render(fast, problem, steps)
    byt5 = tokenizer_by_name("byt5")
    rendered = Tagged(tag="\n", first=" ").render(byt5, problem, steps)
    assert not {*rendered.ids} & {*byt5.all_special_ids}
    assert byt5.decode(rendered.ids) == f"{problem} {steps[0]}\n{steps[1]}\n"
    assert [rendered.ids[position] for position in rendered.score_positions] == [byt5.encode("\n")[0]] * 2
