"""Every preset against its model card's recipe, written out by hand: joined strings, full logits, one by one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.support import cards
from tests.support.hub_folders import (
    WIDTH,
    byte_tokenizer,
    llama_tokenizer,
    load_tokenizer,
    missing_packages,
    save_hub_folder,
)
from trl_grpo_ext.reward_models import base
from trl_grpo_ext.reward_models.heads import LinearHead
from trl_grpo_ext.reward_models.models import OutcomeRewardModel, ProcessRewardModel
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.presets import PRESETS
from trl_grpo_ext.reward_models.readings import AnswerProbability, Sigmoid
from trl_grpo_ext.reward_models.renderings import Bare
from trl_grpo_ext.rewards.types import StepRewards
from trl_grpo_ext.steps.segmentation import Segmentation


# In one process with the other tests of these tokenizers, which take seconds to load
pytestmark = [
    pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages())),
    pytest.mark.xdist_group("tokenizers of the Hub"),
]

PROBLEM = "Sue has 18 pink flamingos. How many are left if she gives away $\\frac{1}{3}$ of them?"
SOLUTIONS = [
    [
        "Step 1: A third of 18 is \\(18/3 = 6\\).",
        "Step 2: 18 - 6 = 12 are left.",
        "Step 3: The answer is \\boxed{12}.",
    ],
    ["Step 1: She keeps 18 × 2 = 36, naïvely.", "Step 2: The answer is 36"],
]


def hub_folder(root, preset, **more):
    name, family, architecture, head, settings = cards.FOLDERS[preset]
    return save_hub_folder(root / name, family, architecture, head=head, **{**settings, **more})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of each preset, written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("hub"), {}

    def folder(preset):
        if preset not in made:
            made[preset] = hub_folder(root, preset)
        return made[preset]

    return folder


@pytest.fixture(scope="module", autouse=True)
def each_tokenizer_is_loaded_once():
    """Folders of one family link to one tokenizer, which takes seconds to load."""

    def from_pretrained(name, **options):
        return load_tokenizer(Path(name)) if not options else AutoTokenizer.from_pretrained(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "AutoTokenizer", SimpleNamespace(from_pretrained=from_pretrained))
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The instruct model that the implicit reward model is compared with."""
    return save_hub_folder(tmp_path_factory.mktemp("hub") / "Qwen2.5-Math-7B-Instruct", "qwen", "Qwen2", seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Model cards


class Card:
    """A checkpoint read by hand: its backbone in `dtype`, its head in float64."""

    def __init__(self, folder, dtype=torch.float32):
        self.tokenizer = load_tokenizer(folder)
        self.config = AutoConfig.from_pretrained(folder)
        self.weights = load_file(folder / "model.safetensors")
        self.backbone = AutoModel.from_config(self.config, dtype=dtype).eval()
        own = {key[len("model.") :]: value for key, value in self.weights.items() if key.startswith("model.")}
        self.backbone.load_state_dict(own)
        self.dtype = dtype

    def weight(self, key):
        return self.weights[key].double()

    @torch.no_grad()
    def hidden(self, ids, mask=None):
        mask = None if mask is None else torch.tensor([mask])
        return self.backbone(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0].double()

    def logits(self, found, mask=None):
        """Over the vocabulary, at the positions of an input."""
        weight = self.weights["lm_head.weight"].to(self.dtype).double()
        return self.hidden(found.ids, mask)[found.positions] @ weight.T

    def linear(self, name, values):
        bias = f"{name}.bias"
        return F.linear(values, self.weight(f"{name}.weight"), self.weight(bias) if bias in self.weights else None)

    def mlp(self, name, found):
        hidden = self.hidden(found.ids)[found.positions]
        return self.linear(f"{name}.2", self.linear(f"{name}.0", hidden).relu())

    def head(self, name, found):
        return self.linear(name, self.hidden(found.ids)[found.positions])


def second_label(logits):
    return logits.softmax(-1)[:, 1]


def granite_prm(card, found):
    """The probability of Y over the whole vocabulary; the model divides its logits."""
    (yes,) = cards.plain(card.tokenizer, "Y")
    return (card.logits(found) / card.config.logits_scaling).softmax(-1)[:, yes]


def openr_qwen_prm(card, found):
    seen = [int(token != 76325) for token in found.ids]
    return card.logits(found, seen)[:, [488, 481]].softmax(-1)[:, 0]


def eurus_prm(card, found):
    prompt = cards.eurus_prompt(card.tokenizer, PROBLEM)
    everywhere = found._replace(positions=list(range(len(found.ids))))
    ratios = []
    for model in (card, card.reference):
        log_probs = model.logits(everywhere).log_softmax(-1)
        ratios.append([0.0] + [float(log_probs[t - 1, found.ids[t]]) for t in range(1, len(found.ids))])
    sums = [sum(ratios[0][t] - ratios[1][t] for t in range(prompt, end + 1)) for end in found.positions]
    return 0.001 * torch.tensor(sums)


def armo_rm(card, found):
    pattern = [128009, 128006, 78191, 128007, 271]
    gate = next(j for j in range(len(found.ids) - 5, -1, -1) if found.ids[j : j + 5] == pattern)
    hidden = card.hidden(found.ids)
    x = hidden[gate]
    for layer in range(2):
        x = card.linear(f"gating.layers.{layer}", x).relu()
    weights = (card.linear("gating.layers.2", x) / 3).softmax(-1) * card.weight("gating.logit_scale")
    objectives = card.linear("regression_layer", hidden[-1]) @ card.weight("reward_transform_matrix")
    return (weights * objectives).sum()[None]


# What each card makes of its model's output at the positions of an input
READ_OUTS = {
    "qwen-math-prm": lambda card, found: second_label(card.mlp("score", found)),
    "reasonflux-prm": lambda card, found: second_label(card.mlp("score", found)),
    "math-shepherd": lambda card, found: card.logits(found)[:, [648, 387]].softmax(-1)[:, 0],
    "rlhflow-prm": lambda card, found: card.logits(found)[:, [10, 12]].softmax(-1)[:, 0],
    "granite-prm": granite_prm,
    "skywork-prm": lambda card, found: card.head("v_head.summary", found).sigmoid()[:, 0],
    "eurus-prm": eurus_prm,
    "trl-prm": lambda card, found: second_label(card.head("score", found)),
    "versa-prm": lambda card, found: card.logits(found)[:, [12, 10]].softmax(-1)[:, 1],
    "openr-qwen-prm": openr_qwen_prm,
    "reason-eval": lambda card, found: card.head("score_head", found).softmax(-1)[:, 1:].sum(-1),
    "acemath-rm": lambda card, found: card.head("score", found)[:, 0],
    "qwen-math-rm": lambda card, found: card.mlp("score", found)[:, 0],
    "world-pm": lambda card, found: card.mlp("score", found)[:, 0],
    "inf-orm": lambda card, found: card.mlp("score", found)[:, 0],
    "grm": lambda card, found: card.mlp("v_head.summary", found)[:, 0],
    "athene-rm": lambda card, found: card.head("v_head", found)[:, 0],
    "rlhflow-orm": lambda card, found: card.logits(found)[:, [10, 12]].softmax(-1)[:, 0],
    "armo-rm": armo_rm,
    "sequence-classification": lambda card, found: card.head("score", found)[:, 0],
}
SOFTMAXES = [name for name in cards.PROCESS_CARDS if name not in ("skywork-prm", "eurus-prm", "granite-prm")]
# Scores near 0 on untrained models: a small factor, one of hundreds of tokens
SMALL = ("eurus-prm", "granite-prm")


def of_card(preset, card, solution):
    """The card's scores of a solution: its steps, or its text."""
    return READ_OUTS[preset](card, cards.CARDS[preset](card.tokenizer, PROBLEM, solution)).tolist()


def test_every_preset_has_its_card():
    assert {*cards.CARDS} == {*PRESETS} == {*cards.FOLDERS} == {*READ_OUTS}


@pytest.mark.parametrize("preset", cards.PROCESS_CARDS)
def test_process_scores_are_the_cards(preset, folders, reference):
    folder = folders(preset)
    options = {"log_ratio_model": str(reference)} if preset == "eurus-prm" else {}
    model = ProcessRewardModel.from_pretrained(str(folder), **options)
    assert model.preset == PRESETS[preset]
    card = Card(folder)
    card.reference = Card(reference)
    scores = model.score_steps([PROBLEM] * 2, SOLUTIONS)
    for steps, read in zip(SOLUTIONS, scores, strict=True):
        expected = of_card(preset, card, steps)
        # All steps differ, so that a score read elsewhere shows
        assert len({round(value, 4 if preset not in SMALL else 8) for value in expected}) == len(steps)
        assert read == pytest.approx(expected, abs=1e-5 if preset not in SMALL else 1e-7)


@pytest.mark.parametrize("preset", cards.OUTCOME_CARDS)
def test_outcome_scores_are_the_cards(preset, folders):
    model = OutcomeRewardModel.from_pretrained(str(folders(preset)))
    assert model.preset == PRESETS[preset]
    solutions = ["\n\n".join(steps) for steps in SOLUTIONS]
    card = Card(folders(preset))
    expected = [of_card(preset, card, solution)[0] for solution in solutions]
    assert model.score(PROBLEM, solutions) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_sequence_classifier_judges_each_unfinished_solution(tmp_path):
    head = {"score.weight": (1, WIDTH)}
    folder = save_hub_folder(tmp_path / "stepwise", "bytes", "Qwen2ForSequenceClassification", head, num_labels=1)
    preset = Preset(
        name="stepwise",
        kind="process",
        rendering=Bare(prompt="{problem}\n", between="\n<step>\n", end="{eos_token}", prefixes=True),
        reading=Sigmoid(),
        head=LinearHead("score", outputs=1, bias=False),
    )
    model = ProcessRewardModel.from_pretrained(str(folder), preset=preset)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected, lengths = [], []
    for steps in SOLUTIONS:
        expected.append([])
        for number in range(len(steps)):
            ids = byte_tokenizer().encode(PROBLEM + "\n" + "\n<step>\n".join(steps[: number + 1]) + "<|im_end|>")
            with torch.no_grad():
                expected[-1].append(float(classifier(torch.tensor([ids])).logits[0, 0].double().sigmoid()))
            lengths.append(len(ids))
    assert len({round(score, 4) for own in expected for score in own}) == len(lengths) == 5
    for read, own in zip(model.score_steps([PROBLEM] * 2, SOLUTIONS), expected, strict=True):
        assert read == pytest.approx(own, abs=1e-6)
    model.max_length = lengths[1]
    assert model.score_steps([PROBLEM], SOLUTIONS[:1]) == [[*map(pytest.approx, expected[0][:2]), None]]
    assert model.score_steps([PROBLEM], [[]]) == [[]]


def test_skywork_reward_v2_on_qwen3_is_what_its_card_loads(tmp_path):
    head = {"score.weight": (1, WIDTH)}
    folder = save_hub_folder(
        tmp_path / "Skywork-Reward-V2-Qwen3-8B", "qwen3", "Qwen3ForSequenceClassification", head, num_labels=1
    )
    model = OutcomeRewardModel.from_pretrained(str(folder))
    assert model.preset == PRESETS["sequence-classification"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    solutions = ["\n\n".join(steps) for steps in SOLUTIONS]
    texts = [cards.chat(byte_tokenizer(), ("user", PROBLEM), ("assistant", solution)) for solution in solutions]
    with torch.no_grad():
        logits = [classifier(**byte_tokenizer()(text, return_tensors="pt")).logits[0, 0] for text in texts]
    assert model.score(PROBLEM, solutions) == pytest.approx([float(logit) for logit in logits], abs=1e-5)


def copy_with_weights(folder, target, change):
    """The same folder with other weights."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).symlink_to(file)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("preset", SOFTMAXES)
def test_probabilities_that_underflow_in_half_precision_are_read_in_full(preset, folders, tmp_path):
    head = cards.FOLDERS[preset][3]
    last = [key for key in head if not key.startswith("score.0")] if head else ["lm_head.weight"]
    card = Card(folders(preset), torch.float16)
    expected = [1.0]
    # Sharper answers, until one is less than half the smallest number of float16
    while min(expected) > 2.0**-26:
        card.weights |= {key: -1.5 * card.weights[key] for key in last}
        expected = of_card(preset, card, SOLUTIONS[0])
    folder = copy_with_weights(folders(preset), tmp_path / folders(preset).name, lambda weights: card.weights)
    model = ProcessRewardModel.from_pretrained(str(folder), dtype=torch.float16, tokenizer=card.tokenizer)
    assert model.scorer.backbone.loaded.dtype == torch.float16
    (read,) = model.score_steps([PROBLEM], [SOLUTIONS[0]])
    assert read == pytest.approx(expected, rel=1e-2, abs=1e-30)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


ADAPTER = "granite-3.3-8b-lora-math-prm"


def test_an_adapter_is_read_on_its_base(folders, tmp_path):
    base = folders("granite-prm")
    torch.manual_seed(3)
    causal = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(causal, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / ADAPTER)
    model = ProcessRewardModel.from_pretrained(str(tmp_path / ADAPTER))
    lora = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")

    def merged(weights):
        for key in [key for key in lora if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[name] = weights[name] + 6 / 2 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
        return weights

    card = Card(copy_with_weights(base, tmp_path / "merged", merged))
    read = model.score_steps([PROBLEM] * 2, SOLUTIONS)
    for steps, own in zip(SOLUTIONS, read, strict=True):
        assert own == pytest.approx(of_card("granite-prm", card, steps), abs=1e-7)
    plain = ProcessRewardModel.from_pretrained(str(base)).score_steps([PROBLEM], SOLUTIONS[:1])
    assert read[0] != pytest.approx(plain[0], rel=1e-2)
    lora.pop(next(iter(lora)))
    save_file(lora, tmp_path / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks base_model.model.model.layers.0.self_attn"):
        ProcessRewardModel.from_pretrained(str(tmp_path / ADAPTER))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "score.2.bias"},
            "qwen-math-prm': the checkpoint lacks score.2.bias",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}, "lacks model.norm.weight"),
        (lambda w: {**w, "score.4.weight": torch.zeros(2, 2)}, "has, against expectation, score.4.weight"),
        (
            lambda w: {k.replace("score.", "classifier."): v for k, v in w.items()},
            "lacks score.0.bias, score.0.weight",
        ),
    ],
)
def test_a_missing_or_unexpected_key_is_an_error_that_shows_it(change, message, folders, tmp_path):
    folder = copy_with_weights(folders("qwen-math-prm"), tmp_path / "Qwen2.5-Math-PRM-7B", change)
    with pytest.raises(ValueError, match=message):
        ProcessRewardModel.from_pretrained(str(folder), tokenizer=load_tokenizer(folders("qwen-math-prm")))


def test_a_process_reward_model_under_another_preset_lacks_its_head(folders):
    with pytest.raises(ValueError, match="lacks score.weight"):
        OutcomeRewardModel.from_pretrained(
            str(folders("math-shepherd")), preset="sequence-classification", tokenizer=llama_tokenizer()
        )


def test_a_tag_that_is_not_one_id_is_an_error_that_shows_the_ids(folders):
    with pytest.raises(ValueError, match=r"the tag '<extra_0>' must be one id in this tokenizer; it is \[27, "):
        ProcessRewardModel.from_pretrained(str(folders("qwen-math-prm")), tokenizer=llama_tokenizer())


def test_unknown_models_and_wrong_kinds_are_errors_that_name_the_way_out(folders, tmp_path):
    folder = copy_with_weights(folders("math-shepherd"), tmp_path / "some-llm", dict)
    with pytest.raises(ValueError, match="no preset fits '.*some-llm'; pass preset= as one of qwen-math-prm"):
        ProcessRewardModel.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="there is no preset 'shepherd'"):
        ProcessRewardModel.from_pretrained(str(folder), preset="shepherd")
    with pytest.raises(ValueError, match="is of kind 'process' .*, not 'outcome'"):
        OutcomeRewardModel.from_pretrained(str(folder), preset="math-shepherd")
    assert ProcessRewardModel.from_pretrained(str(folder), preset="math-shepherd").preset.semantics == "value"


def test_a_preset_of_the_users_own_in_yaml_is_the_same(tmp_path):
    file = tmp_path / "preset.yaml"
    file.write_text(
        """
name: math-shepherd
models: ["peiyi9979/math-shepherd-mistral-7b-prm"]
kind: process
rendering: {type: Tagged, tag: " ки", first: " ", between: "\\n", bos: true}
reading: {type: TokenPair, good: " +", bad: " -"}
segmentation: {by: newline}
semantics: value
reduce: last
""",
        encoding="utf-8",
    )
    assert Preset.from_yaml(file) == PRESETS["math-shepherd"]
    with pytest.raises(ValueError, match=r"preset.rendering: unknown type 'Taged'"):
        Preset.from_dict({"name": "a", "kind": "process", "rendering": {"type": "Taged"}, "reading": {}})
    with pytest.raises(ValueError, match=r"preset.reading: unknown field 'goood' of TokenPair"):
        reading = {"type": "TokenPair", "goood": "+"}
        Preset.from_dict({"name": "a", "kind": "process", "rendering": {"type": "Turns"}, "reading": reading})


def test_new_forms_of_a_preset_are_written_in_yaml(tmp_path):
    file = tmp_path / "preset.yaml"
    file.write_text(
        """
name: athene-rm
models: Nexusflow/Athene-RM-*
kind: outcome
rendering: {type: Bare, chat: true, as_text: true, closing: all, end: "{cls_token}"}
reading: {type: SequenceScalar}
head: {type: LinearHead, name: v_head, outputs: 1, bias: false}
stray_keys: lm_head.*
semantics: reward
max_length: 4096
""",
        encoding="utf-8",
    )
    assert Preset.from_yaml(file) == PRESETS["athene-rm"]
    own = {"name": "own", "kind": "outcome", "reading": {"type": "SequenceScalar"}, "rendering": {"type": "Bare"}}
    head = {"type": "MLPHead", "name": "v_head.summary", "outputs": 1, "widths": [1024]}
    assert Preset.from_dict({**own, "head": head}).head == PRESETS["grm"].head
    with pytest.raises(ValueError, match="AnswerProbability reads the answers of the rendering Turns, and Bare"):
        Preset(name="own", kind="outcome", rendering=Bare(), reading=AnswerProbability())


def test_a_second_reward_model_from_the_same_folder_shares_its_weights(folders):
    first = ProcessRewardModel.from_pretrained(str(folders("math-shepherd")))
    lines = Segmentation(by="tokens", window=5)
    second = ProcessRewardModel.from_pretrained(first.name, weights_of=first, segmentation=lines)
    assert second.scorer.backbone is first.scorer.backbone and second.segmentation == lines
    assert second.score_steps([PROBLEM], SOLUTIONS[:1]) == first.score_steps([PROBLEM], SOLUTIONS[:1])
    with pytest.raises(ValueError, match="weights_of holds"):
        ProcessRewardModel.from_pretrained(str(folders("trl-prm")), weights_of=first)


def test_a_reward_model_stays_in_evaluation_mode_and_without_gradients(folders):
    model = ProcessRewardModel.from_pretrained(str(folders("math-shepherd")))
    assert not any(module.training for module in model.scorer.modules())
    assert not any(parameter.requires_grad for parameter in model.scorer.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.fixture(scope="module")
def shepherd(folders):
    return ProcessRewardModel.from_pretrained(str(folders("math-shepherd")))


def test_truncation_keeps_the_question_and_leaves_whole_last_steps_unscored(shepherd, folders):
    (whole,) = shepherd.score_steps([PROBLEM], SOLUTIONS[:1])
    reads = shepherd._render(PROBLEM, SOLUTIONS[0]).score_positions
    for length, scored in ((reads[2] + 1, 3), (reads[2], 2), (reads[0] + 1, 1), (reads[0], 0), (3, 0)):
        short = ProcessRewardModel.from_pretrained(
            shepherd.name, weights_of=shepherd, max_length=length, tokenizer=shepherd.tokenizer
        )
        (scores,) = short.score_steps([PROBLEM], SOLUTIONS[:1])
        assert scores == pytest.approx([*whole[:scored], *[None] * (3 - scored)])
    short.policy_tokenizer = short.tokenizer
    # Some releases of transformers would put a beginning-of-sequence id first
    ids = short.tokenizer.encode("12", add_special_tokens=False)
    assert short(prompts=[PROBLEM], completion_ids=[ids]) == [StepRewards([len(ids) - 1], [None])]


THOUGHT = "<think>\n" + "So 3 * 4 is 12.\n\n" * 20 + "</think>\n\n"


def test_thinking_out_of_scope_takes_no_room_from_the_answer(shepherd):
    answer = "3 * 4 = 12\n2 + 12 = 14"
    options = {"weights_of": shepherd, "tokenizer": shepherd.tokenizer, "max_length": 80}
    scoped = ProcessRewardModel.from_pretrained(
        shepherd.name, segmentation={"by": "newline", "scope": "answer"}, **options
    )
    plain = ProcessRewardModel.from_pretrained(
        shepherd.name, segmentation={"by": "newline", "scope": "all"}, **options
    )
    (alone,) = scoped.score(PROBLEM, [answer])
    assert None not in alone and len(alone) == 2
    assert scoped.score(PROBLEM, [THOUGHT + answer]) == [pytest.approx(alone)]
    # Thinking, which comes first, would take all of it
    assert plain.score(PROBLEM, [THOUGHT + answer])[0][-2:] == [None, None]
    # On the policy's tokens
    policy = scoped.policy_tokenizer = byte_tokenizer()
    thought, ids = (policy.encode(text, add_special_tokens=False) for text in (THOUGHT, THOUGHT + answer))
    (rewards,) = scoped(prompts=[PROBLEM], completion_ids=[ids])
    assert rewards == StepRewards([len(thought) + len("3 * 4 = 12\n") - 1, len(ids) - 1], pytest.approx(alone))
    # Cut off while the policy thinks; the template has opened thinking
    cut_off = policy.encode("So 3 * 4 is 12.", add_special_tokens=False)
    prompt_ids = [policy.encode("<|im_start|>assistant\n<think>\n", add_special_tokens=False)]
    assert scoped(prompts=[PROBLEM], completion_ids=[cut_off], prompt_ids=prompt_ids) == [StepRewards([], [])]


def test_an_outcome_model_reads_what_is_in_scope(folders):
    name = str(folders("sequence-classification"))
    model = OutcomeRewardModel.from_pretrained(name, segmentation={"scope": "answer"})
    answer = "3 * 4 = 12\n\n2 + 12 = 14"
    (alone,) = model.score(PROBLEM, [answer])
    assert model.score(PROBLEM, [THOUGHT + answer, THOUGHT[:50]]) == [pytest.approx(alone), None]
    assert OutcomeRewardModel.from_pretrained(name, weights_of=model).score(PROBLEM, [answer]) == [alone]
    policy = model.policy_tokenizer = byte_tokenizer()
    texts = [THOUGHT + answer, THOUGHT[:50], answer]
    given = model(
        prompts=[PROBLEM] * 3,
        completions=["not read"] * 3,
        completion_ids=[[*policy.encode(text, add_special_tokens=False), policy.eos_token_id] for text in texts],
    )
    assert given == [pytest.approx(alone), None, pytest.approx(alone)]


def test_batches_by_tokens_equal_one_by_one_and_keep_their_bound(shepherd):
    lengths = [1, 7, 2, 5, 3, 1, 6, 4]
    solutions = [[f"Step {k}: {k} + {n} = {k + n}." for k in range(length)] for n, length in enumerate(lengths)]
    problems = [f"{PROBLEM} ({n})" * (1 + n % 3) for n in range(len(lengths))]
    sizes = []
    backbone = shepherd.scorer.backbone
    hook = backbone.register_forward_pre_hook(lambda module, args: sizes.append(args[0].input_ids_BL.numel()))
    alone = [shepherd.score_steps([problem], [own])[0] for problem, own in zip(problems, solutions, strict=True)]
    longest = max(sizes)
    for copies in (1, 6):
        for budget in (longest, 3 * longest):
            sizes.clear()
            shepherd.batch_tokens = budget
            together = shepherd.score_steps(problems * copies, solutions * copies)
            for expected, read in zip(alone * copies, together, strict=True):
                assert read == pytest.approx(expected, abs=1e-5)
            assert max(sizes) <= budget and sum(sizes) > budget
    hook.remove()


@pytest.mark.parametrize("preset", ["math-shepherd", "eurus-prm", "reason-eval"])
def test_a_process_with_fewer_batches_runs_as_many_forwards_as_the_others(preset, folders, reference, monkeypatch):
    options = {"log_ratio_model": str(reference)} if preset == "eurus-prm" else {}
    model = ProcessRewardModel.from_pretrained(str(folders(preset)), **options)
    alone = model.score_steps([PROBLEM] * 2, SOLUTIONS)
    forwards = []
    model.scorer.backbone.register_forward_pre_hook(lambda module, args: forwards.append(1))
    monkeypatch.setattr(
        "trl_grpo_ext.reward_models.token_budget.gather", lambda accelerator, own: torch.cat([own, own + 2])
    )
    model.accelerator = SimpleNamespace(device="cpu")
    assert model.score_steps([PROBLEM] * 2, SOLUTIONS) == alone
    assert len(forwards) == 3
    assert model.score_steps([], []) == [] and len(forwards) == 5


def test_the_policys_tokens_carry_the_scores(shepherd):
    policy = llama_tokenizer()
    text = "Step 1: 18/3 = 6 naïve 🦩\n\nStep 2: 18 - 6 = 12 ки\nStep 3: \\boxed{12}"
    ids = policy.encode(text, add_special_tokens=False)
    lines = ["Step 1: 18/3 = 6 naïve 🦩", "Step 2: 18 - 6 = 12 ки", "Step 3: \\boxed{12}"]
    conversation = [
        {"role": "user", "content": "not this"},
        {"role": "assistant", "content": "nor this"},
        {"role": "user", "content": PROBLEM},
    ]
    with pytest.raises(ValueError, match="has no `policy_tokenizer`"):
        shepherd(prompts=[PROBLEM], completions=[text], completion_ids=[ids])
    shepherd.policy_tokenizer = policy
    rewards = shepherd(
        prompts=[conversation, PROBLEM, PROBLEM],
        completions=[text, "", text],
        completion_ids=[[*ids, 128009], [128009], ids],
        answer=["12"] * 3,
    )
    ends = []
    for line in lines:
        stop = text.index(line) + len(line)
        ends.append(next(n for n in range(len(ids)) if policy.decode(ids[: n + 1]).startswith(text[:stop])))
    # The separator belongs to the step before it
    ends = [end + (policy.decode(ids[end + 1]).strip() == "") if end + 1 < len(ids) else end for end in ends]
    (scores,) = shepherd.score_steps([PROBLEM], [lines])
    assert rewards[1] == StepRewards([], [])
    for reward in (rewards[0], rewards[2]):
        assert isinstance(reward, StepRewards)
        assert list(reward.ends) == ends
        assert reward.values == pytest.approx(scores, abs=1e-6)


def test_score_splits_solutions_as_the_preset_says(shepherd, folders):
    text = "Step 1: a.\nStep 2: b.\n\nStep 3: c."
    assert shepherd.split(text) == ["Step 1: a.", "Step 2: b.", "Step 3: c."]
    (read,) = shepherd.score(PROBLEM, [text])
    assert read == shepherd.score_steps([PROBLEM], [["Step 1: a.", "Step 2: b.", "Step 3: c."]])[0]
    other = ProcessRewardModel.from_pretrained(
        shepherd.name, weights_of=shepherd, segmentation=Segmentation(by="newline", max_steps=2)
    )
    assert other.split(text) == ["Step 1: a.", "Step 2: b.\n\nStep 3: c."]
    with pytest.raises(ValueError, match="solution 1: step 1 is empty"):
        shepherd.score_steps([PROBLEM] * 2, [["a"], ["a", " "]])
    with pytest.raises(ValueError, match="1 problems for 2 solutions"):
        shepherd.score_steps([PROBLEM], [["a"], ["b"]])


def test_an_outcome_model_is_called_as_a_reward_function(folders):
    model = OutcomeRewardModel.from_pretrained(str(folders("sequence-classification")))
    expected = model.score(PROBLEM, ["12", "13"])
    prompts = [[{"role": "user", "content": PROBLEM}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("12", "13")]
    assert model(prompts=prompts, completions=completions, completion_ids=[[1], [2]]) == pytest.approx(expected)
    assert model(prompts=[PROBLEM] * 2, completions=["12", "13"]) == pytest.approx(expected)
    model.max_length = 20
    assert model.score(PROBLEM, ["12"]) == [None]


@pytest.mark.parametrize("preset", ["math-shepherd", "sequence-classification"])
def test_self_check_tells_a_model_from_its_negation(preset, folders, tmp_path):
    cls = {"process": ProcessRewardModel, "outcome": OutcomeRewardModel}[PRESETS[preset].kind]
    outcomes = []
    for sign in (1, -1):
        key = "lm_head.weight" if preset == "math-shepherd" else "score.weight"
        folder = copy_with_weights(
            folders(preset),
            tmp_path / str(sign) / folders(preset).name,
            lambda weights, key=key, sign=sign: {**weights, key: sign * weights[key]},
        )
        try:
            cls.from_pretrained(str(folder)).self_check()
            outcomes.append("passes")
        except ValueError as error:
            assert "the corrupted one must score lower" in str(error)
            outcomes.append("fails")
    assert sorted(outcomes) == ["fails", "passes"]
