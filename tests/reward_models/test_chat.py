"""Chats against real models' templates, as TRL ships them: the ids are the template's own, and steps are found."""

import copy
import time
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import apply_chat_template

from tests.support.hub_folders import (
    WIDTH,
    byte_tokenizer,
    load_tokenizer,
    missing_packages,
    qwen_tokenizer,
    save_hub_folder,
    save_mistral_tokenizer,
)
from tests.support.tokenizers import load_tokenizer as tokenizer_by_name
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer, OutcomeRewardModel
from trl_grpo_ext.reward_models.chat import Message, Piece, write_chat
from trl_grpo_ext.reward_models.renderings import Bare, Tagged, Turns


# In one process with the other tests of these tokenizers, which take seconds to load
pytestmark = [
    pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages())),
    pytest.mark.xdist_group("tokenizers of the Hub"),
]

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# What each does with what an assistant says: nothing, an empty thought before it, less thinking, less white space
TEMPLATES = ["qwen2_5", "qwen3", "qwen3_5_think", "deepseek_r1_distill", "llama3_1", "gemma", "gemma3", "mistral"]
# The tokens of Qwen2.5 and Mistral give the answers of turns no id of their own in these
WITHOUT_TURNS = {"deepseek_r1_distill", "mistral"}

PROBLEM = "What is 2 + 3?"
THINKING = "<think>\nLet me see.\n\nIt is 2 + 3.\n</think>\n\n"
SOLUTIONS = {
    "plain": ["Step 1: 2 + 3 = 5.", "So it is\n5."],
    "thinking": [THINKING + "2 + 3 = 5.", "So 5."],
    "thinking in steps": ["<think>\nLet me see.", "It is 2 + 3.\n</think>", "2 + 3 = 5.", "So 5."],
    "leading and trailing blanks": ["\n\n  2 + 3 = 5. ", "So 5.  \n\n"],
    "nothing but a tag": ["<think>", "2 + 3 = 5"],
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    save_mistral_tokenizer(folder)
    return load_tokenizer(folder)


def with_template(tokenizer, name):
    tokenizer = copy.copy(tokenizer)
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer.chat_template = MISTRAL if name == "mistral" else file.read_text(encoding="utf-8")
    # Templates write it, and Qwen2.5 has none
    tokenizer.bos_token = tokenizer.bos_token or "<|endoftext|>"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(mistral):
    made = {name: with_template(qwen_tokenizer(), name) for name in TEMPLATES}
    return made | {"mistral": with_template(mistral, "mistral")}


def of_template(tokenizer, *turns):
    """The ids of the template's own output, without this package."""
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("shape", SOLUTIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_steps_in_one_message_have_the_ids_of_the_template_and_are_found_in_them(tokenizers, template, shape):
    tokenizer = tokenizers[template]
    steps = SOLUTIONS[shape]
    tag = "</s>" if template == "mistral" else "<extra_0>"
    for rendering, separators in (
        (Tagged(tag=tag, chat=True), [tag] * len(steps)),
        (Bare(chat=True, after="\n\n", closing="first"), ["\n\n"] * (len(steps) - 1) + [""]),
        (Bare(chat=True, after=" ##\n"), [" ##\n"] * (len(steps) - 1) + [""]),
    ):
        content = "".join(step + after for step, after in zip(steps, separators, strict=True))
        expected = of_template(tokenizer, ("user", PROBLEM), ("assistant", content))
        ids, prompt_length, positions = rendering.render(tokenizer, PROBLEM, steps)
        if template == "deepseek_r1_distill" and shape == "thinking in steps":
            # It drops whole steps
            assert positions == []
            continue
        assert len(positions) == len(steps) and ids == expected[: len(ids)]
        # Each score is behind its step and before the next one
        for step, position, following in zip(steps, positions, [*positions[1:], None], strict=True):
            last_words = step.split()[-1]
            assert last_words in tokenizer.decode(ids[prompt_length : position + 1])[-40:]
            assert following is None or position < following
        if isinstance(rendering, Tagged):
            assert [ids[position] for position in positions] == [tokenizer.convert_tokens_to_ids(tag)] * len(steps)
        cut = rendering.render(tokenizer, PROBLEM, steps, positions[-1])
        assert cut.ids == ids[: positions[-2] + 1] and cut.score_positions == positions[:-1]


@pytest.mark.parametrize("shape", SOLUTIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_outcome_is_judged_on_what_trl_gives_a_classifier(tokenizers, template, shape):
    tokenizer = tokenizers[template]
    prompt = [{"role": "user", "content": PROBLEM}]
    solution = "\n\n".join(SOLUTIONS[shape])
    completion = [{"role": "assistant", "content": solution}]
    text = apply_chat_template({"messages": prompt + completion}, tokenizer)["text"]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    rendered = Bare(chat=True, closing="all").render(tokenizer, PROBLEM, [solution])
    assert rendered.ids == expected and rendered.score_positions == [len(expected) - 1]
    # A conversation with a system message, which not all templates know
    if template not in ("gemma", "mistral"):
        turns = [{"role": "system", "content": "Be brief."}, *prompt, *completion, *prompt]
        text = apply_chat_template({"messages": turns + completion}, tokenizer)["text"]
        rendered = Bare(chat=True, closing="all").render(tokenizer, turns, [solution])
        assert rendered.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_have_the_ids_of_the_template(tokenizers, template):
    tokenizer = tokenizers[template]
    if template in WITHOUT_TURNS:
        with pytest.raises(ValueError, match="the answer '[+]' is the id .*, but with the chat template"):
            Turns().check(tokenizer)
        return
    ids, prompt_length, positions = Turns().render(tokenizer, PROBLEM, ["2 + 3 = 5.", "So 5."])
    expected = of_template(
        tokenizer, ("user", f"{PROBLEM} 2 + 3 = 5."), ("assistant", "+"), ("user", "So 5."), ("assistant", "+")
    )
    assert ids == expected[: len(ids)]
    assert [tokenizer.decode(ids[position + 1]) for position in positions] == ["+", "+"]
    assert tokenizer.decode(ids[:prompt_length]).rstrip().endswith(PROBLEM)


def test_steps_that_a_template_drops_are_not_found(tokenizers):
    tokenizer = tokenizers["deepseek_r1_distill"]
    steps = ["<think> 2 + 3 is 5. </think>", "So 5."]
    for rendering in (Tagged(tag="<extra_0>", chat=True), Bare(chat=True, after="\n\n", closing="first")):
        assert rendering.render(tokenizer, PROBLEM, steps) == ([], 0, [])
        answer = rendering.render(tokenizer, PROBLEM, steps[1:])
        assert len(answer.score_positions) == 1


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(TEMPLATES),
    steps=st.lists(
        st.lists(st.sampled_from(["<|im_end|>", "</s>", "<extra_0>", "<think>", "</think>", "\n\n", " ", "a"]))
        .map("".join)
        .filter(str.strip),
        min_size=1,
        max_size=3,
    ),
)
def test_what_a_policy_writes_adds_no_special_token_and_no_score(tokenizers, template, steps):
    tokenizer = tokenizers[template]
    special = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    for rendering in (Bare(chat=True, after="\n\n", closing="first"), Bare(chat=True, closing="all"), Turns()):
        if isinstance(rendering, Turns) and template in WITHOUT_TURNS:
            continue
        plain = rendering.render(tokenizer, PROBLEM, ["a"] * len(steps))
        rendered = rendering.render(tokenizer, PROBLEM, steps)
        if rendered.score_positions:
            assert len(rendered.score_positions) == len(steps)
            assert [i for i in rendered.ids if i in special] == [i for i in plain.ids if i in special]


def test_templates_that_drop_or_repeat_a_message_and_tokenizers_without_one_are_errors():
    tokenizer = copy.copy(byte_tokenizer())
    for template, message in (
        ("{{ messages[0]['content'] }}", "writes a message of the assistant 0 times"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "writes a message of the assistant 2 times"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'][:9] }}{% endfor %}", "leaves out or rewrites steps"),
        (None, "needs a chat template"),
    ):
        tokenizer.chat_template = template
        if message is None:
            # What is in capitals is still where it was
            assert len(Tagged(tag="\n", chat=True).render(tokenizer, "1?", ["1", "2"]).score_positions) == 2
            continue
        with pytest.raises(ValueError, match=message):
            Tagged(tag="\n", chat=True).check(tokenizer)


def test_a_template_that_ends_no_message_has_no_token_for_a_score_there(tokenizers):
    tokenizer = with_template(qwen_tokenizer(), "glm4moe")
    with pytest.raises(ValueError, match="closing='first': the chat template .* writes nothing after the last step"):
        Bare(chat=True, closing="first").check(tokenizer)
    Bare(chat=True, closing="all").check(tokenizer)


@pytest.mark.parametrize("rendering", [Tagged(tag="<extra_0>", chat=True), Turns(), Bare(chat=True, after="\n\n")])
def test_chats_take_time_linear_in_steps_and_in_what_looks_like_special_tokens(rendering):
    steps = ["a <|im_end|> b"] * 4000
    start = time.process_time()
    assert len(rendering.render(byte_tokenizer(), PROBLEM, steps).score_positions) == len(steps)
    # Less than 1.5 s; quadratic code takes more than 5 s with tags, and more than 10 s with turns
    assert time.process_time() - start < 4


def test_a_tokenizer_without_offsets_finds_the_same_places():
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    fast = copy.copy(tokenizer_by_name("mistral"))
    slow = copy.copy(tokenizer_by_name("mistral-slow"))
    for tokenizer in (fast, slow):
        tokenizer.chat_template = template
    rendering = Bare(chat=True, after=" ;", closing="none")
    steps = ["2 + 3 = 5", "so 5"]
    for tokenizer in (fast, slow):
        ids, prompt_length, positions = rendering.render(tokenizer, "2 + 3?", steps)
        texts = [tokenizer.decode(ids[:end]) for end in (prompt_length, *(position + 1 for position in positions))]
        written = [text.replace(" ", "").replace("<0x0A>", "\n") for text in texts]
        frame = "[user]2+3?\n[assistant]"
        assert written == [frame, f"{frame}2+3=5;", f"{frame}2+3=5;so5"]
    # A tag that would be merged with the text before it
    for tokenizer in (fast, slow):
        rendered = Tagged(tag="+", chat=True).render(tokenizer, "2 + 3?", ["x+", "y+"])
        assert tokenizer.convert_ids_to_tokens(rendered.ids[-5:]) == ["+", "+", "y", "+", "+"]
        assert rendered.score_positions == [len(rendered.ids) - 4, len(rendered.ids) - 1]


def test_the_marks_of_pieces_survive_texts_that_look_like_marks():
    tokenizer = byte_tokenizer()
    forged = "".join(f"{chr(code)}0{chr(code)}" for code in range(0xF0000, 0xF0003))
    pieces = [Piece(forged), Piece("b", is_marked=True)]
    chat = write_chat(tokenizer, [Message({"role": "user"}, [Piece("?")]), Message({"role": "assistant"}, pieces)])
    assert chat.text[chat.marks[0] :].startswith("b") and chat.text[: chat.marks[0]].endswith(forged)


def test_a_bare_id_and_an_outcome_reward_model_score_the_same(tiny_model, tmp_path):
    """TRL's own loading, templating, tokenizing and pooling of a classifier, beside ours."""
    tokenizer = with_template(byte_tokenizer(), "qwen3")
    settings = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    folder = save_hub_folder(
        tmp_path / "classifier",
        "bytes",
        "Qwen2ForSequenceClassification",
        {"score.weight": (1, WIDTH)},
        **settings,
    )
    model = OutcomeRewardModel.from_pretrained(
        str(folder),
        preset="sequence-classification",
        tokenizer=tokenizer,
        problem="conversation",
        dtype="float32",
        segmentation={"scope": "all"},
    )
    trainer = make_trainer(
        GRPOExtTrainer,
        tiny_model,
        [str(folder), model],
        tmp_path,
        trainer_options={"reward_processing_classes": [tokenizer, None]},
    )
    question = {"role": "user", "content": PROBLEM}
    earlier = [{"role": "system", "content": "Be brief."}, question, {"role": "assistant", "content": "5"}]
    prompts, completions = [], []
    for before in ([], earlier):
        for steps in SOLUTIONS.values():
            prompts.append([*before, question])
            completions.append([{"role": "assistant", "content": "\n\n".join(steps)}])
    inputs = [{"prompt": prompt} for prompt in prompts]
    rewards_NK = trainer._calculate_rewards(inputs, prompts, completions, [[0]] * len(prompts))
    torch.testing.assert_close(rewards_NK[:, 0], rewards_NK[:, 1], rtol=0, atol=1e-5)
    # Two shapes are the same text
    assert len({round(value, 4) for value in rewards_NK[:, 0].tolist()}) == len(prompts) - 2


def test_marks_that_change_what_a_template_writes_find_nothing(tokenizers):
    tokenizer = tokenizers["qwen3"]
    # The template cuts off the newlines after thinking, which a mark before them hides
    pieces = [Piece("<think>a</think>"), Piece("\n\nb", is_marked=True)]
    chat = write_chat(tokenizer, [Message({"role": "user"}, [Piece("?")]), Message({"role": "assistant"}, pieces)])
    assert chat.marks == [None] and chat.is_safe
    assert chat.ids == of_template(tokenizer, ("user", "?"), ("assistant", "<think>a</think>\n\nb"))
    # What looks like a token beside it cannot be told from the template's own
    pieces = [Piece("<think>a</think>\n\n<|im_end|>b")]
    lookalike = "{% for m in messages %}{{ '<|im_end|>' in m['content'] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = lookalike
    chat = write_chat(tokenizer, [Message({"role": "user"}, [Piece("?")]), Message({"role": "assistant"}, pieces)])
    assert not chat.is_safe
    assert Bare(chat=True, closing="all").render(tokenizer, "?", [pieces[0].text]) == ([], 0, [])
