"""What of a prompt a reward model or a judge is given as the problem."""

import asyncio
import copy
import dataclasses
import functools
import json

import pytest
from datasets import Dataset

from tests.support.hub_folders import byte_tokenizer, save_hub_folder
from trl_grpo_ext import (
    GRPOExtConfig,
    GRPOExtTrainer,
    JudgeOutcome,
    JudgeSteps,
    ProcessRewardModel,
    RemoteOutcomeRewardModel,
    RemoteProcessRewardModel,
)
from trl_grpo_ext.reward_models import problem as problem_module
from trl_grpo_ext.reward_models.models import OutcomeRewardModel
from trl_grpo_ext.reward_models.opening import open_reward_models
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.problem import ProblemReader
from trl_grpo_ext.reward_models.readings import TokenPair
from trl_grpo_ext.reward_models.remote import transport
from trl_grpo_ext.reward_models.renderings import Bare, Tagged


URL = "http://127.0.0.1:1"
SYSTEM = {"role": "system", "content": "Be exact."}
FIRST = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}
LAST = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "times 4?"}]}
PROMPT = [SYSTEM, FIRST, ANSWER, LAST]
CONVERSATION = [SYSTEM, FIRST, ANSWER, {"role": "user", "content": "And times 4?"}]
IMAGE = {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "What is this?"}]}

# As TRL's prompts may have it: a message that calls a tool has no content
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
TOOL = {"role": "tool", "name": "add", "content": "5"}

CHAT = Preset(
    name="chat",
    kind="process",
    rendering=Tagged(tag="<extra_0>", chat=True, system="The preset's."),
    reading=TokenPair(good="+", bad="-"),
)
PLAIN = Preset(name="plain", kind="process", rendering=Tagged(tag="\n"), reading=TokenPair(good="+", bad="-"))


def question_of(prompt, question):
    return f"{question} ({len(prompt)} messages)"


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(problem_module.logger, "warning", messages.append)
    return messages


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return str(save_hub_folder(tmp_path_factory.mktemp("hub") / "causal", "bytes", "Qwen2ForCausalLM"))


def read(problem, prompts, takes_conversations=True, tokenizers=(), **columns):
    return ProblemReader(problem, takes_conversations).read(prompts, columns, "source", tokenizers)


# ---------------------------------------------------------------------------------------------------------------------
# The choices


def test_each_choice_gives_its_problem(said):
    columns = {"question": ["q1", "q2"], "beside": [1], "trainer_state": object()}
    assert read("last_user", [PROMPT, "plain"], **columns) == ["And times 4?", "plain"]
    assert read("conversation", [PROMPT, "plain"], **columns) == [CONVERSATION, "plain"]
    assert read({"column": "question"}, [PROMPT, "plain"], **columns) == ["q1", "q2"]
    assert read(question_of, [PROMPT, PROMPT], **columns) == ["q1 (4 messages)", "q2 (4 messages)"]
    assert read(lambda prompt: prompt[:2], [PROMPT]) == [CONVERSATION[:2]]
    path = f"{__name__}:question_of"
    assert read(path, [PROMPT], question=["q"]) == ["q (4 messages)"]
    assert ProblemReader(path, True).required_columns == ["question"]
    assert ProblemReader({"column": "question"}, True).required_columns == ["question"]
    assert ProblemReader("conversation", True).required_columns == []


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        (
            "question",
            ValueError,
            "problem is 'question'; known: last_user, conversation, {'column': name}, a function",
        ),
        ("no_such_module:f", ValueError, "problem='no_such_module:f' cannot be imported"),
        ({"columns": "question"}, ValueError, r"problem is {'columns': 'question'}; a column is given as {'column'"),
        ({"column": 5}, ValueError, "a column is given as"),
        ({"column": "prompt"}, ValueError, "the prompt is no column here: 'conversation' gives all its messages"),
        (5, TypeError, "problem is 5; known:"),
        (asyncio.sleep, TypeError, "known: .* a function"),
    ],
)
def test_a_choice_that_is_none_is_named(problem, error, message):
    with pytest.raises(error, match=message):
        ProblemReader(problem, True)


def test_a_problem_that_is_none_is_named_with_where_it_comes_from():
    with pytest.raises(ValueError, match="source: the problem is the column 'answer', which the data set lacks"):
        read({"column": "answer"}, ["P"], question=["q"])
    with pytest.raises(
        TypeError, match=r"the problem \(column 'question'\) is 5; it must be a text or a conversation"
    ):
        read({"column": "question"}, ["P"], question=[5])
    with pytest.raises(TypeError, match=r"the problem \(of your function\) is None"):
        read(lambda prompt: None, ["P"])
    with pytest.raises(TypeError, match="is a conversation, and a text is needed"):
        read(lambda prompt: prompt, [PROMPT], takes_conversations=False)
    with pytest.raises(TypeError, match="has a parameter 'question', which is no column .* may name: answer, prompt."):
        read(question_of, [PROMPT], answer=["5"])
    for content in (5, {"type": "text", "text": "1?"}, ["1?"], [{"text": "1?"}], [{"type": "text", "text": None}]):
        for problem in ("last_user", "conversation"):
            with pytest.raises(TypeError, match="has the content .* A message's content is a text, None, or a list"):
                read(problem, [[{"role": "user", "content": content}]])
    with pytest.raises(TypeError, match="it must be a text or a conversation"):
        read("conversation", [[{"content": "1?"}]])
    with pytest.raises(ValueError, match="also has parts of type image. Reward models .* read text alone"):
        read("conversation", [[IMAGE, ANSWER, LAST]])
    with pytest.raises(ValueError, match="the prompt's last user message, also has parts of type image"):
        read("last_user", [[IMAGE]])


# ---------------------------------------------------------------------------------------------------------------------
# Warnings


def test_what_is_left_out_is_said_once_with_the_way_to_keep_it(said):
    reader = ProblemReader("last_user", True)
    reader.read([[FIRST]], {}, "source")
    assert said == []
    reader.read([PROMPT, PROMPT], {}, "source")
    reader.read([PROMPT], {}, "source")
    (message,) = said
    assert "source: the problem is what the user said last" in message
    assert "1 of the system, 1 of the user, 1 of the assistant; problem='conversation' keeps them" in message
    read("conversation", [PROMPT])
    read(lambda prompt: "P", [PROMPT])
    assert len(said) == 1


@pytest.mark.parametrize(
    ("prompt", "marker"),
    [
        ("<|im_start|>user\n1?<|im_end|>\n", "<|im_end|>, <|im_start|>"),
        ("<s>[INST] 1? [/INST]", r"[INST]"),
        ("a <|box_end|> b", "<|box_end|>"),
        ("2 < 3 and [1, 2]", None),
        ([{"role": "user", "content": "What does <|im_start|> mean?"}], None),
    ],
)
def test_the_markers_of_a_template_in_a_plain_prompt_are_said_once(said, prompt, marker):
    reader = ProblemReader("last_user", True)
    for _ in range(2):
        assert len(reader.read([prompt, prompt], {}, "source", [None, byte_tokenizer()])) == 2
    assert len(said) == (marker is not None)
    assert all(f"source: a prompt that is text holds {marker}, as if" in message for message in said)


def test_a_message_may_be_without_content(said):
    prompt = [FIRST, CALL, TOOL, LAST]
    assert read("conversation", [prompt]) == [[FIRST, {**CALL, "content": ""}, TOOL, CONVERSATION[-1]]]
    assert read("last_user", [prompt]) == ["And times 4?"]
    assert "1 of the user, 1 of the assistant, 1 of the tool; problem=" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# The sources


def test_a_loaded_model_is_given_the_problem(causal, said):
    model = ProcessRewardModel.from_pretrained(causal, preset=CHAT, problem="conversation")
    model.policy_tokenizer = byte_tokenizer()
    rendered = []
    model._score = lambda solutions: rendered.extend(solutions) or [[0.5] for _ in solutions]
    ids = byte_tokenizer().encode("So 20.")
    model([PROMPT, [FIRST]], completion_ids=[ids, ids], question=["q", "q"])
    conversations = [CONVERSATION, [{"role": "system", "content": "The preset's."}, FIRST]]
    for one, messages in zip(rendered, conversations, strict=True):
        messages = [*messages, {"role": "assistant", "content": "So 20.<extra_0>"}]
        text = byte_tokenizer().apply_chat_template(messages, tokenize=False)
        assert byte_tokenizer().decode(one.ids) == text.rpartition("<|im_end|>")[0]
    model.problem = {"column": "question"}
    assert model.required_columns == ["question"] and model.inputs_key()[5] == {"column": "question"}
    model([PROMPT], completion_ids=[ids], question=["q"])
    assert "user\nq<|im_end|>" in byte_tokenizer().decode(rendered[-1].ids)
    assert model.score_steps([PROMPT], [["5"]]) == [[0.5]] and said == []
    with pytest.raises(TypeError, match=r"problems\[0\] is 5; it must be a text or a conversation"):
        model.score_steps([5], [["5"]])


def test_a_template_that_drops_thinking_leaves_solutions_unjudged_and_says_so(causal, monkeypatch):
    warned = []
    monkeypatch.setattr("trl_grpo_ext.steps.policy_text.logger.warning_once", warned.append)
    tokenizer = copy.copy(byte_tokenizer())
    drops = "{% for m in messages %}<|im_start|>{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
    tokenizer.chat_template = drops
    model = ProcessRewardModel.from_pretrained(causal, preset=CHAT, tokenizer=tokenizer)
    thinking = ["<think> 5 * 4", "is 20. </think>", "So 20."]
    unjudged, (answer,) = model.score_steps(["And times 4?"] * 2, [thinking, thinking[-1:]])
    assert unjudged == [None] * 3 and answer is not None
    (message,) = warned
    assert f"process reward model '{causal}': the chat template leaves out or rewrites a step" in message
    assert "Segmentation(scope='answer')" in message


def test_a_template_that_refuses_a_conversation_is_named(causal):
    tokenizer = copy.copy(byte_tokenizer())
    refuses = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    tokenizer.chat_template = refuses + "{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.name_or_path = "a-tokenizer"
    message = "the chat template of the tokenizer 'a-tokenizer' refuses the roles system, user, .*assistant: No system"
    with pytest.raises(ValueError, match=message):
        ProcessRewardModel.from_pretrained(causal, preset=CHAT, tokenizer=tokenizer)
    preset = dataclasses.replace(CHAT, rendering=Tagged(tag="<extra_0>", chat=True))
    model = ProcessRewardModel.from_pretrained(causal, preset=preset, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        model.score_steps([PROMPT], [["5"]])
    remote = RemoteProcessRewardModel(URL, preset=preset, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        asyncio.run(remote.score_steps([PROMPT], [["5"]]))


def test_a_conversation_needs_a_template_and_says_so_before_anything_is_loaded(causal):
    outcome = Preset(name="o", kind="outcome", rendering=Bare(), reading=TokenPair(good="+", bad="-"))
    for make in (
        lambda: ProcessRewardModel.from_pretrained(causal, preset=PLAIN, problem="conversation"),
        lambda: OutcomeRewardModel.from_pretrained(causal, preset=outcome, problem="conversation"),
        lambda: open_reward_models([causal], {"preset": PLAIN, "problem": "conversation"}),
        lambda: RemoteProcessRewardModel(URL, problem="conversation"),
        lambda: RemoteOutcomeRewardModel(URL, problem="conversation"),
        lambda: RemoteOutcomeRewardModel(
            URL, protocol="vllm", preset=outcome, tokenizer=byte_tokenizer(), problem="conversation"
        ),
    ):
        with pytest.raises(ValueError, match="problem='conversation': this source writes the problem as a text"):
            make()
    with pytest.raises(TypeError, match="is a conversation, and a text is needed"):
        ProcessRewardModel.from_pretrained(causal, preset=PLAIN).score_steps([PROMPT], [["5"]])
    (opened,) = open_reward_models([causal], {"preset": PLAIN, "problem": {"column": "question"}})
    assert opened.required_columns == ["question"]


def answered(monkeypatch, answer):
    sent = []

    async def post(self, payload, before=None):
        sent.append(payload)
        return answer

    monkeypatch.setattr(transport.Session, "post", post)
    return sent


def test_a_server_is_sent_the_problem(monkeypatch):
    solution = [{"role": "assistant", "content": "So 20."}]
    sent = answered(monkeypatch, {"rewards": [1.0]})
    plain = RemoteOutcomeRewardModel(URL, problem={"column": "question"}, label_column="answer")
    assert plain.required_columns == ["question", "answer"]
    assert asyncio.run(plain([PROMPT], [solution], question=["q"], answer=["20"])) == [1.0]
    assert sent[-1]["prompts"] == ["q"]
    sent = answered(monkeypatch, {"data": [{"probs": [1.0]}]})
    vllm = RemoteOutcomeRewardModel(URL, protocol="vllm", problem="conversation")
    assert asyncio.run(vllm([PROMPT], [solution])) == [1.0]
    assert sent[-1]["messages"] == [*CONVERSATION, *solution]
    sent = answered(monkeypatch, {"step_scores": [[1.0]]})
    rendered = RemoteProcessRewardModel(URL, preset=CHAT, tokenizer=byte_tokenizer(), problem="conversation")
    rendered.policy_tokenizer = byte_tokenizer()
    asyncio.run(rendered([PROMPT], [byte_tokenizer().encode("So 20.")]))
    text = byte_tokenizer().apply_chat_template(CONVERSATION, tokenize=False)
    assert sent[-1]["prompts"] == [f"{text}<|im_start|>assistant\n"]


@pytest.mark.parametrize("kind", [JudgeSteps, JudgeOutcome])
def test_a_judge_is_given_the_problem(monkeypatch, kind):
    verdict = {"steps": [{"step": 1, "critique": "", "correct": True}]} if kind is JudgeSteps else {"correct": True}
    sent = answered(monkeypatch, {"choices": [{"message": {"content": json.dumps({"critique": "", **verdict})}}]})
    ids = byte_tokenizer().encode("So 20.")
    completion = [{"role": "assistant", "content": "So 20."}]
    asked = [
        ("conversation", PROMPT, CONVERSATION),
        ({"column": "question"}, PROMPT, "q"),
        (question_of, PROMPT, "q (4 messages)"),
        ("conversation", [IMAGE, ANSWER, FIRST], [{"role": "user", "content": "What is this?"}, ANSWER, FIRST]),
    ]
    monkeypatch.setattr("trl_grpo_ext.reward_models.remote.judge.images_of", lambda prompt: [])
    for problem, prompt, expected in asked:
        judge = kind(URL, "m", problem=problem)
        judge.policy_tokenizer = byte_tokenizer()
        assert judge.required_columns == (["question"] if "q" in expected else [])
        asyncio.run(judge([prompt], [completion], completion_ids=[ids], question=["q"]))
        data = sent[-1]["messages"][-1]["content"]
        written = json.loads(data[data.index("{") : data.rindex("}") + 1])
        assert written["problem"] == expected


@pytest.mark.parametrize("kind", [JudgeSteps, JudgeOutcome])
def test_a_judge_s_problem_may_be_of_any_column_and_prompt(monkeypatch, kind, said):
    verdict = {"steps": [{"step": 1, "critique": "", "correct": True}]} if kind is JudgeSteps else {"correct": True}
    sent = answered(monkeypatch, {"choices": [{"message": {"content": json.dumps({"critique": "", **verdict})}}]})
    ids = byte_tokenizer().encode("So 20.")
    columns = {name: [f"the column {name}"] for name in ("problem", "steps", "completion", "hint")}
    for problem, prompt, expected in [
        # Names that judges have for something else too
        *[({"column": name}, [FIRST], f"the column {name}") for name in ("problem", "steps", "completion")],
        (lambda prompt, hint="none": hint, [FIRST], "the column hint"),
        (lambda problem: problem, [FIRST], "the column problem"),
        ("last_user", [FIRST, CALL, TOOL, FIRST], FIRST["content"]),
        ("last_user", "<|im_start|>user\n1?", "<|im_start|>user\n1?"),
    ]:
        judge = kind(URL, "m", problem=problem)
        judge.policy_tokenizer = byte_tokenizer()
        asyncio.run(judge([prompt], ["So 20."], completion_ids=[ids], **columns))
        data = sent[-1]["messages"][-1]["content"]
        written = json.loads(data[data.index("{") : data.rindex("}") + 1])
        assert written["problem"].replace("\u2060", "") == expected
        assert "So 20." in json.dumps(written)
    left_out, markers = said
    assert "1 of the user, 1 of the assistant, 1 of the tool" in left_out and "holds <|im_start|>, as if" in markers


def test_a_judge_s_own_template_writes_a_conversation_after_its_roles(monkeypatch):
    format = JudgeSteps(URL, "m")._format
    filled = functools.partial(format.fill, steps=[], completion="", more={})
    written = "system: Be exact.\n\nuser: What is 2 + 3?\n\nassistant: 5\n\nuser: And times 4?"
    assert filled("{{problem}}", CONVERSATION) == written


def test_a_column_that_the_data_set_lacks_is_named_before_training(causal, tmp_path, tiny_model):
    model = ProcessRewardModel.from_pretrained(causal, preset=CHAT, problem={"column": "question"})
    args = GRPOExtConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=4)
    with pytest.raises(TypeError, match="needs the column 'question', which train_dataset lacks"):
        GRPOExtTrainer(tiny_model, [model], args, train_dataset=Dataset.from_dict({"prompt": ["P"] * 8}))
