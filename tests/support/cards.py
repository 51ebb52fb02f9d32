"""
What the model cards' own code makes of a problem and a solution: ids, and where their scores are.

Each function is a transcription of one card, or of the code that its authors publish: joined strings, tokenized as a
whole, and tags found in the ids. Nothing here imports the package under test.
"""

from typing import NamedTuple

from tests.support.hub_folders import WIDTH


QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
ACEMATH_SYSTEM = "Please reason step by step, and check your final answer within \\boxed{}."


class Input(NamedTuple):
    ids: list[int]
    positions: list[int]


def chat(tokenizer, *messages):
    """The text of the chat template."""
    messages = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def at(ids, tag):
    return [position for position, token in enumerate(ids) if token == tag]


def qwen_math_prm(tokenizer, problem, steps, system=QWEN_SYSTEM):
    answer = "<extra_0>".join(steps) + "<extra_0>"
    messages = [("user", problem), ("assistant", answer)]
    ids = tokenizer.encode(chat(tokenizer, *([("system", system)] if system else []), *messages))
    return Input(ids, at(ids, 151651))


def reasonflux_prm(tokenizer, problem, steps):
    return qwen_math_prm(tokenizer, problem, steps, system=None)


def math_shepherd(tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} " + "\n".join(f"{step} ки" for step in steps))
    assert ids[0] == tokenizer.bos_token_id
    return Input(ids, at(ids, 12902))


def rlhflow_prm(tokenizer, problem, steps):
    conversation, positions = [], []
    for number, step in enumerate(steps):
        conversation += [("user", f"{problem} {step}" if number == 0 else step), ("assistant", "+")]
        # Each step is judged by a forward of its own, whose ids begin those of the next
        ids = plain(tokenizer, chat(tokenizer, *conversation))
        positions.append(len(ids) - 3)
    return Input(ids, positions)


def granite_prm(tokenizer, problem, steps):
    question = "Is this response correct so far (Y/N)?"
    conversation = []
    for number, step in enumerate(steps):
        content = f"{problem} {step} {question}" if number == 0 else f"{step} {question}"
        conversation += [("user", content), ("assistant", "Y")]
    ids = plain(tokenizer, chat(tokenizer, *conversation))
    # What the template writes before an answer
    empty, asked = (chat(tokenizer, ("user", "?"), *answer) for answer in ([], [("assistant", "Y")]))
    before = plain(tokenizer, asked.removeprefix(empty).split("Y")[0])
    yes = plain(tokenizer, "Y")[0]
    positions = [t - 1 for t in at(ids, yes) if ids[t - len(before) : t] == before]
    return Input(ids, positions)


def skywork_prm(tokenizer, problem, steps):
    ids, positions = tokenizer.encode(tokenizer.bos_token + problem + "\n"), []
    newline = tokenizer.encode("\n")[-1]
    for step in steps:
        # Each line of the response is a step there, blank ones too; here a step may have several
        for line in step.split("\n"):
            ids = ids + tokenizer.encode(line) + [newline]
        positions.append(len(ids) - 1)
    return Input(ids, positions)


def eurus_prm(tokenizer, problem, steps):
    ids = tokenizer.encode(chat(tokenizer, ("user", problem), ("assistant", "\n\n".join(steps))))
    prompt = eurus_prompt(tokenizer, problem)
    positions = []
    for number in range(1, len(steps) + 1):
        begun = "\n\n".join(steps[:number]) + ("\n\n" if number < len(steps) else "<|im_end|>")
        positions.append(prompt + len(tokenizer.encode(begun)) - 1)
    return Input(ids, positions)


def eurus_prompt(tokenizer, problem):
    """Number of ids before the answer."""
    return len(tokenizer.encode(chat(tokenizer, ("user", problem), ("assistant", "")).removesuffix("<|im_end|>\n")))


def trl_prm(tokenizer, problem, steps):
    ids, positions = [tokenizer.bos_token_id, *plain(tokenizer, problem)], []
    for step in steps:
        ids = ids + plain(tokenizer, step) + plain(tokenizer, "\n")
        positions.append(len(ids) - 1)
    return Input(ids, positions)


def versa_prm(tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} \n\n" + "".join(f"{step} \n\n\n\n" for step in steps))
    return Input(ids, at(ids, 23535))


def openr_qwen_prm(tokenizer, problem, steps):
    ids = tokenizer.encode(f"{problem} " + "".join(f"{step} \n\n\n\n\n" for step in steps))
    return Input(ids, at(ids, 76325))


def reason_eval(tokenizer, problem, steps):
    mark = tokenizer.pad_token
    text = f"Question:\n{problem}\nAnswer:\nLet's think step by step.\n"
    marked = tokenizer.encode(text + mark + "".join(step + mark for step in steps))
    ids, ends = [], []
    for token in marked:
        if token == tokenizer.pad_token_id:
            ends.append(len(ids) - 1)
        else:
            ids.append(token)
    return Input(ids, ends[1:])


def last_token_rm(system=None):
    """The template's text, scored at its last token."""

    def render(tokenizer, problem, solution):
        opening = [] if system is None else [("system", system)]
        ids = plain(tokenizer, chat(tokenizer, *opening, ("user", problem), ("assistant", solution)))
        return Input(ids, [len(ids) - 1])

    return render


def grm(tokenizer, problem, solution):
    # The tokenizer writes its beginning-of-sequence token before the template's
    ids = tokenizer(chat(tokenizer, ("user", problem), ("assistant", solution)))["input_ids"]
    return Input(ids, [len(ids) - 1])


def athene_rm(tokenizer, problem, solution):
    text = chat(tokenizer, ("user", problem), ("assistant", solution)) + tokenizer.cls_token
    ids = tokenizer(text)["input_ids"]
    return Input(ids, at(ids, 128003)[-1:])


def rlhflow_orm(tokenizer, problem, solution):
    ids = plain(tokenizer, chat(tokenizer, ("user", f"{problem} {solution}"), ("assistant", "+")))
    return Input(ids, [len(ids) - 3])


PROCESS_CARDS = {
    "qwen-math-prm": qwen_math_prm,
    "reasonflux-prm": reasonflux_prm,
    "math-shepherd": math_shepherd,
    "rlhflow-prm": rlhflow_prm,
    "granite-prm": granite_prm,
    "skywork-prm": skywork_prm,
    "eurus-prm": eurus_prm,
    "trl-prm": trl_prm,
    "versa-prm": versa_prm,
    "openr-qwen-prm": openr_qwen_prm,
    "reason-eval": reason_eval,
}
OUTCOME_CARDS = {
    "acemath-rm": last_token_rm(ACEMATH_SYSTEM),
    "qwen-math-rm": last_token_rm(QWEN_SYSTEM),
    "world-pm": last_token_rm(""),
    "inf-orm": last_token_rm(),
    "grm": grm,
    "athene-rm": athene_rm,
    "rlhflow-orm": rlhflow_orm,
    "armo-rm": last_token_rm(),
    "sequence-classification": last_token_rm(),
}
CARDS = PROCESS_CARDS | OUTCOME_CARDS


class Folder(NamedTuple):
    """A folder of the Hub: its last part, what `save_hub_folder` takes, and fields of its config."""

    name: str
    family: str
    architecture: str
    head: dict[str, tuple[int, ...]] | None
    settings: dict


MLP = {"score.0.weight": (WIDTH, WIDTH), "score.0.bias": (WIDTH,)}

# What lies on the Hub of each card
FOLDERS = {
    "qwen-math-prm": Folder(
        "Qwen2.5-Math-PRM-7B",
        "qwen",
        "Qwen2ForProcessRewardModel",
        {**MLP, "score.2.weight": (2, WIDTH), "score.2.bias": (2,)},
        {"lm_head": True, "max_position_embeddings": 4096},
    ),
    "reasonflux-prm": Folder(
        "ReasonFlux-PRM-7B",
        "qwen",
        "Qwen2ForProcessRewardModel",
        {**MLP, "score.2.weight": (2, WIDTH), "score.2.bias": (2,)},
        {"lm_head": True},
    ),
    "math-shepherd": Folder("math-shepherd-mistral-7b-prm", "mistral", "MistralForCausalLM", None, {}),
    "rlhflow-prm": Folder("Llama3.1-8B-PRM-Deepseek-Data", "llama", "LlamaForCausalLM", None, {}),
    "granite-prm": Folder(
        "granite-3.3-8b-math-prm-v2", "granite", "GraniteForCausalLM", None, {"logits_scaling": 2.0}
    ),
    "skywork-prm": Folder(
        "Skywork-o1-Open-PRM-Qwen-2.5-1.5B",
        "skywork",
        "Qwen2ForCausalLM",
        {"v_head.summary.weight": (1, WIDTH), "v_head.summary.bias": (1,)},
        {"lm_head": True},
    ),
    "eurus-prm": Folder("EurusPRM-Stage2", "qwen", "Qwen2ForCausalLM", None, {}),
    "trl-prm": Folder(
        "my-own-prm",
        "llama",
        "LlamaForTokenClassification",
        {"score.weight": (2, WIDTH), "score.bias": (2,)},
        {"num_labels": 2},
    ),
    "versa-prm": Folder("Llama-PRM800K", "llama", "LlamaForCausalLM", None, {}),
    "openr-qwen-prm": Folder("Math-psa", "qwen", "Qwen2ForCausalLM", None, {}),
    "reason-eval": Folder(
        "ReasonEval-7B",
        "mistral",
        "ReasonEval_7B",
        {"score_head.weight": (3, WIDTH)},
        {"use_bias": False, "lm_head": True},
    ),
    "acemath-rm": Folder(
        "AceMath-7B-RM",
        "qwen",
        "Qwen2ForSequenceClassification",
        {"score.weight": (1, WIDTH)},
        {"num_labels": 1},
    ),
    "qwen-math-rm": Folder(
        "Qwen2.5-Math-RM-72B",
        "qwen",
        "Qwen2ForRewardModel",
        {**MLP, "score.2.weight": (1, WIDTH), "score.2.bias": (1,)},
        {"lm_head": True},
    ),
    "world-pm": Folder(
        "WorldPM-72B-HelpSteer2",
        "qwen",
        "Qwen2ForRewardModel",
        {**MLP, "score.2.weight": (1, WIDTH), "score.2.bias": (1,)},
        {"lm_head": True},
    ),
    "inf-orm": Folder(
        "INF-ORM-Llama3.1-70B",
        "llama",
        "INFORMForSequenceClassification",
        {**MLP, "score.2.weight": (1, WIDTH), "score.2.bias": (1,)},
        {"num_labels": 1},
    ),
    "grm": Folder(
        "GRM-llama3-8B-sftreg",
        "llama",
        "GRewardModel",
        {
            "v_head.summary.0.weight": (1024, WIDTH),
            "v_head.summary.0.bias": (1024,),
            "v_head.summary.2.weight": (1, 1024),
            "v_head.summary.2.bias": (1,),
        },
        {"lm_head": True},
    ),
    "athene-rm": Folder(
        "Athene-RM-8B",
        "llama",
        "CustomAutoModelForSequenceClassification",
        {"v_head.weight": (1, WIDTH)},
        {"lm_head": True},
    ),
    "rlhflow-orm": Folder("Llama3.1-8B-ORM-Mistral-Data", "llama", "LlamaForCausalLM", None, {}),
    "armo-rm": Folder(
        "ArmoRM-Llama3-8B-v0.1",
        "llama",
        "LlamaForRewardModelWithGating",
        {
            "regression_layer.weight": (19, WIDTH),
            "reward_transform_matrix": (19, 19),
            "gating.logit_scale": (1,),
            "gating.layers.0.weight": (8, WIDTH),
            "gating.layers.0.bias": (8,),
            "gating.layers.1.weight": (8, 8),
            "gating.layers.1.bias": (8,),
            "gating.layers.2.weight": (19, 8),
            "gating.layers.2.bias": (19,),
        },
        {"gating_hidden_dim": 8, "gating_n_hidden": 2, "gating_temperature": 3, "num_labels": 1},
    ),
    # Llama 3.1 pads with the token that ends a message, which transformers would skip when it pools
    "sequence-classification": Folder(
        "Skywork-Reward-V2-Llama-3.1-8B",
        "llama",
        "LlamaForSequenceClassification",
        {"score.weight": (1, WIDTH)},
        {"num_labels": 1, "pad_token_id": 128009},
    ),
}
