"""One backbone under several reward models: loaded once, run once where inputs are the same, moved, quantised."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from tests.support.tiny_models import save_tiny_model, tiny_tokenizer
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer, ProcessRewardModel
from trl_grpo_ext.reward_models.heads import LinearHead
from trl_grpo_ext.reward_models.opening import open_reward_model, open_reward_models
from trl_grpo_ext.reward_models.preset import Preset
from trl_grpo_ext.reward_models.presets import PRESETS
from trl_grpo_ext.reward_models.readings import LabelSoftmax, LogRatio, Sigmoid, TokenPair
from trl_grpo_ext.reward_models.renderings import Tagged


TAGGED = Tagged(tag=";")
PAIR = Preset("pair", "process", TAGGED, TokenPair("+", "-"))
OTHER_PAIR = Preset("other-pair", "process", TAGGED, TokenPair("a", "b"))
RATIO = Preset("ratio", "process", TAGGED, LogRatio(beta=1.0))
LABELS = Preset("labels", "process", TAGGED, LabelSoftmax((1,)), LinearHead("score", 2), stray_keys=("v_head.*",))
VALUE = Preset("value", "process", TAGGED, Sigmoid(), LinearHead("v_head", 1), stray_keys=("score.*",))

# The quantisation's blocks must fit
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.15}
PROBLEMS = ["1+2=", "3+4=", "1+2=", "ab"]
STEPS = [["a+b", "c"], ["d-e", "f=1", "g"], ["a+b", "c"], ["0"]]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("causal"), **SIZES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("reference"), **SIZES | {"initializer_range": 0.1})


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    """A checkpoint with a head of two labels and a value head."""
    folder = tmp_path_factory.mktemp("two_heads")
    save_tiny_model(folder, LlamaForTokenClassification, num_labels=2, **SIZES)
    weights = load_file(folder / "model.safetensors")
    weights |= {"v_head.weight": 0.2 * torch.randn(1, 64), "v_head.bias": torch.randn(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_adapter(base, folder, seed, with_head):
    """A LoRA adapter; with a head of labels, as PEFT saves token classification."""
    torch.manual_seed(seed)
    auto = AutoModelForTokenClassification if with_head else AutoModelForCausalLM
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="TOKEN_CLS" if with_head else "CAUSAL_LM")
    adapted = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def forwards_of(backbone):
    counted = []
    backbone.hidden_states.register_forward_pre_hook(lambda *args: counted.append(1))
    return counted


def load(folder, preset, **options):
    return ProcessRewardModel.from_pretrained(str(folder), preset=preset, **options)


def by_itself(folder, preset, **options):
    """What a reward model scores that shares nothing."""
    return load(folder, preset, **options).score_steps(PROBLEMS, STEPS)


def assert_same(found, expected):
    assert len({value for values in expected for value in values}) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def weights_of(model):
    return {weight.data_ptr() for weight in model.scorer.backbone.hidden_states.parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Sharing


def test_two_heads_of_a_checkpoint_run_its_backbone_once(two_heads):
    labels = load(two_heads, LABELS)
    value = load(two_heads, VALUE, weights_of=labels)
    assert weights_of(value) == weights_of(labels)
    assert value.__name__ == f"{labels.__name__}-value"
    counted = forwards_of(labels.scorer.backbone)
    first = value.score_steps(PROBLEMS, STEPS)
    second = labels.score_steps(PROBLEMS, STEPS)
    assert len(counted) == 1
    assert_same(first, by_itself(two_heads, VALUE))
    assert_same(second, by_itself(two_heads, LABELS))


def test_readings_of_the_vocabulary_run_the_backbone_once(causal, reference):
    pair = load(causal, PAIR)
    ratio = load(causal, RATIO, weights_of=pair, log_ratio_model=reference)
    other = load(causal, OTHER_PAIR, weights_of=ratio)
    assert weights_of(pair) == weights_of(ratio) == weights_of(other)
    counted, of_reference = forwards_of(pair.scorer.backbone), forwards_of(ratio.scorer.log_ratio_model.backbone)
    found = [model.score_steps(PROBLEMS, STEPS) for model in (pair, ratio, other)]
    assert len(counted) == len(of_reference) == 1
    assert_same(found[0], by_itself(causal, PAIR))
    assert_same(found[1], by_itself(causal, RATIO, log_ratio_model=reference))
    assert_same(found[2], by_itself(causal, OTHER_PAIR))


def test_a_second_log_ratio_shares_the_second_model_too_unless_it_names_another(causal, reference):
    first = load(causal, RATIO, log_ratio_model=reference)
    double = dataclasses.replace(RATIO, name="double", reading=LogRatio(beta=2.0))
    second = load(causal, double, weights_of=first)
    assert second.scorer.log_ratio_model is first.scorer.log_ratio_model
    ratios = first.score_steps(PROBLEMS, STEPS)
    assert_same(second.score_steps(PROBLEMS, STEPS), [[2 * value for value in values] for values in ratios])
    itself = load(causal, double, weights_of=first, log_ratio_model=causal)
    assert {value for values in itself.score_steps(PROBLEMS, STEPS) for value in values} == {0.0}
    with pytest.raises(ValueError, match="preset 'ratio' needs log-ratios: pass log_ratio_model="):
        load(causal, RATIO)


def test_shared_scores_are_of_the_same_inputs_and_used_once(two_heads):
    labels = load(two_heads, LABELS)
    value = load(two_heads, VALUE, weights_of=labels)
    counted = forwards_of(labels.scorer.backbone)
    labels.score_steps(PROBLEMS, STEPS)
    # One solution is known, one differs in its last step
    changed = [STEPS[0], ["d-e", "f=1", "h"]]
    assert_same(value.score_steps(PROBLEMS[:2], changed), load(two_heads, VALUE).score_steps(PROBLEMS[:2], changed))
    assert len(counted) == 2
    value.score_steps(PROBLEMS, STEPS)
    assert len(counted) == 3


def test_identical_inputs_are_run_once(two_heads):
    labels = load(two_heads, LABELS)
    sizes = []
    labels.scorer.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0].input_ids_BL)))
    scores = labels.score_steps(PROBLEMS, STEPS)
    assert sizes == [3] and scores[0] == scores[2]


def test_reward_models_with_other_inputs_run_by_themselves(two_heads):
    labels = load(two_heads, LABELS)
    short = load(two_heads, VALUE, weights_of=labels, max_length=8)
    counted = forwards_of(labels.scorer.backbone)
    labels.score_steps(PROBLEMS, STEPS)
    assert_same(short.score_steps(PROBLEMS, STEPS), by_itself(two_heads, VALUE, max_length=8))
    assert len(counted) == 2


def test_adapters_on_one_base_each_keep_their_own_scores(causal, tmp_path):
    base = load(causal, PAIR)
    plain = [save_adapter(causal, tmp_path / name, seed, with_head=False) for seed, name in enumerate("ab")]
    models = [load(tmp_path / name, PAIR, weights_of=base) for name in "ab"]
    tokenizer = tiny_tokenizer()
    pair = tokenizer.convert_tokens_to_ids(["+", "-"])
    assert models[0].scorer.backbone is models[1].scorer.backbone is base.scorer.backbone
    counted = forwards_of(base.scorer.backbone)
    # Each leaves its adapter switched on; first the one that was loaded last
    for _ in range(2):
        for model, adapted in [(models[1], plain[1]), (base, None), (models[0], plain[0])]:
            for problem, steps, read in zip(PROBLEMS, STEPS, model.score_steps(PROBLEMS, STEPS), strict=True):
                ids = tokenizer.encode(problem + "".join(step + ";" for step in steps))
                own = adapted if adapted is not None else AutoModelForCausalLM.from_pretrained(causal)
                logits = own(torch.tensor([ids])).logits[0][:, pair].softmax(-1)
                at = [n for n, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(";")]
                assert read == pytest.approx(logits[at, 0].tolist(), abs=1e-5)
    assert len(counted) == 6
    assert not any(parameter.requires_grad for parameter in base.scorer.parameters())


def test_adapters_bring_their_own_heads(causal, tmp_path):
    plain = [save_adapter(causal, tmp_path / name, seed, with_head=True) for seed, name in enumerate("ab")]
    first = load(tmp_path / "a", LABELS)
    second = load(tmp_path / "b", LABELS, weights_of=first)
    tokenizer = tiny_tokenizer()
    assert weights_of(first) == weights_of(second)
    for model, adapted in zip((first, second, first), (*plain, plain[0]), strict=True):
        for problem, steps, read in zip(PROBLEMS, STEPS, model.score_steps(PROBLEMS, STEPS), strict=True):
            ids = tokenizer.encode(problem + "".join(step + ";" for step in steps))
            logits = adapted(torch.tensor([ids])).logits[0].softmax(-1)
            at = [n for n, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(";")]
            assert read == pytest.approx(logits[at, 1].tolist(), abs=1e-5)


def test_a_head_alone_is_read_on_another_models_backbone(causal, tmp_path):
    base = load(causal, PAIR)
    head = {"score.weight": 0.2 * torch.randn(2, 64), "score.bias": torch.randn(2)}
    (tmp_path / "head").mkdir()
    save_file(head, tmp_path / "head" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "head" / "config.json").write_text(json.dumps(LlamaConfig.from_pretrained(causal).to_dict()))
    alone = load(tmp_path / "head", LABELS, weights_of=base, tokenizer=base.tokenizer)
    counted = forwards_of(base.scorer.backbone)
    base.score_steps(PROBLEMS, STEPS)
    found = alone.score_steps(PROBLEMS, STEPS)
    assert len(counted) == 1
    whole = AutoModelForTokenClassification.from_pretrained(causal, num_labels=2)
    whole.score.load_state_dict({key.removeprefix("score."): value for key, value in head.items()})
    whole.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    assert_same(found, by_itself(tmp_path / "whole", LABELS))
    with pytest.raises(ValueError, match="weights_of holds .* but .*whole' has weights of its own beside its head"):
        load(tmp_path / "whole", LABELS, weights_of=base)


def test_a_trailing_slash_or_a_path_names_the_same_folder(two_heads):
    first = ProcessRewardModel.from_pretrained(Path(two_heads), preset=LABELS)
    second = ProcessRewardModel.from_pretrained(f"{two_heads}/", preset=LABELS, weights_of=first)
    assert second.scorer.backbone is first.scorer.backbone and second.__name__ != first.__name__


def test_a_text_is_no_list_of_solutions_or_steps(two_heads):
    model = ProcessRewardModel.from_pretrained(two_heads, preset=LABELS)
    with pytest.raises(TypeError, match="solutions is a text, '1\\+1=2'"):
        model.score("1+1", "1+1=2")
    with pytest.raises(TypeError, match="solution 0 is a text, '1\\+1=2'"):
        model.score_steps(["1+1"], ["1+1=2"])


def test_weights_that_cannot_be_shared_are_refused(causal, reference, two_heads, tmp_path):
    pair, labels = load(causal, PAIR), load(two_heads, LABELS)
    save_adapter(reference, tmp_path / "a", 0, with_head=False)
    for model, preset, other, options, message in (
        (reference, PAIR, pair, {}, "'.*reference.*' needs '.*reference"),
        (tmp_path / "a", PAIR, pair, {}, "'.*a' needs '.*reference"),
        (two_heads, PAIR, labels, {}, "preset 'pair' needs the vocabulary; load that one first"),
        (causal, OTHER_PAIR, pair, {"dtype": torch.bfloat16}, "dtype cannot be chosen any more"),
    ):
        with pytest.raises(ValueError, match=f"weights_of holds .*, but {message}"):
            load(model, preset, weights_of=other, **options)
    pair.prepare(Accelerator(cpu=True), None, None)
    with pytest.raises(ValueError, match="a trainer has placed it already"):
        load(causal, OTHER_PAIR, weights_of=pair)


# ---------------------------------------------------------------------------------------------------------------------
# Bare ids


def test_ids_over_one_base_share_it(causal, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "pair", Preset(**{**vars(PAIR), "models": ("*pair-*", "*causal*")}))
    for seed, name in enumerate(("pair-a", "pair-b")):
        save_adapter(causal, tmp_path / name, seed, with_head=False)

    def own(completions, **columns):
        return [0.0] * len(completions)

    opened = open_reward_models([str(tmp_path / "pair-a"), own, str(tmp_path / "pair-b")], {"dtype": torch.float32})
    assert opened[1] is own
    assert opened[0].scorer.backbone is opened[2].scorer.backbone
    assert_same(opened[2].score_steps(PROBLEMS, STEPS), by_itself(tmp_path / "pair-b", PAIR))


def test_a_classifiers_id_is_left_to_trl_with_its_revision(tiny_model, tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "classifier", LlamaForSequenceClassification, num_labels=1)
    assert open_reward_model(folder, {}) == folder
    loaded = []

    class Tokenizers:
        @staticmethod
        def from_pretrained(name, **options):
            loaded.append((name, options["revision"]))
            return tiny_tokenizer()

    monkeypatch.setattr("trl.trainer.grpo_trainer.AutoTokenizer", Tokenizers)
    trainer = make_trainer(
        GRPOExtTrainer, tiny_model, [folder], tmp_path, max_steps=1, model_init_kwargs={"revision": "a1b2"}
    )
    assert (folder, "a1b2") in loaded
    assert isinstance(trainer.reward_funcs[0], LlamaForSequenceClassification)
    assert not any(weight.is_meta for weight in trainer.reward_funcs[0].parameters())


def test_no_device_map_is_used_under_several_processes(two_heads, monkeypatch):
    monkeypatch.setitem(PRESETS, "labels", Preset(**{**vars(LABELS), "models": (two_heads,)}))
    load_model, asked = AutoModel.from_pretrained, []

    def from_pretrained(name, **options):
        asked.append(options["device_map"])
        return load_model(name, **options)

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    for distributed_type in ("NO", "MULTI_GPU"):
        state = SimpleNamespace(distributed_type=distributed_type)
        monkeypatch.setattr("trl_grpo_ext.reward_models.opening.PartialState", lambda state=state: state)
        open_reward_model(two_heads, {"device_map": "cpu"})
    assert asked == ["cpu", None]


# ---------------------------------------------------------------------------------------------------------------------
# Offload


def test_an_offloaded_model_is_on_the_trainers_device_only_while_it_scores(causal, reference):
    model = load(causal, RATIO, log_ratio_model=reference, offload=True)
    backbones = model.scorer.backbones
    accelerator = Accelerator(cpu=True)
    model.prepare(accelerator, None, None)
    expected = by_itself(causal, RATIO, log_ratio_model=reference)
    assert_same(model.score_steps(PROBLEMS, STEPS), expected)

    seen = []

    def stop(module, args, inputs):
        seen.append({tensor.device.type for tensor in (*module.parameters(), *module.buffers())})
        seen.append({inputs["input_ids"].device.type})
        raise InterruptedError

    hook = backbones[0].hidden_states.register_forward_pre_hook(stop, with_kwargs=True)
    for backbone in backbones:
        backbone.accelerator = SimpleNamespace(device=torch.device("meta"), distributed_type="NO")
    with pytest.raises(InterruptedError):
        model.score_steps(PROBLEMS, STEPS)
    assert seen == [{"meta"}, {"meta"}]
    assert {weight.device.type for weight in model.scorer.parameters()} == {"cpu"}
    assert all(backbone._copy is None for backbone in backbones)
    hook.remove()
    for backbone in backbones:
        backbone.accelerator = accelerator
    assert_same(model.score_steps(PROBLEMS, STEPS), expected)


def test_what_cannot_be_placed_is_refused_with_the_reason(causal):
    zero3 = SimpleNamespace(
        distributed_type="DEEPSPEED",
        deepspeed_plugin=SimpleNamespace(zero_stage=3),
        verify_device_map=lambda module: False,
    )
    model = load(causal, PAIR, offload=True)
    with pytest.raises(ValueError, match="offload=True cannot move what ZeRO-3 shards; leave it out"):
        model.prepare(zero3, None, None)
    model = load(causal, PAIR)
    model.scorer.backbone.quantized = True
    with pytest.raises(ValueError, match="ZeRO-3 cannot shard quantised weights"):
        model.prepare(zero3, None, None)
    several = SimpleNamespace(distributed_type="MULTI_GPU", verify_device_map=lambda module: True)
    with pytest.raises(ValueError, match="device_map spreads it over several devices"):
        model.prepare(several, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def test_scores_are_read_in_float32_under_autocast(two_heads, request):
    AcceleratorState._reset_state(reset_partial_state=True)
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    model = load(two_heads, LABELS)
    model.prepare(Accelerator(cpu=True, mixed_precision="bf16"), None, None)
    read = []
    head = model.scorer.readout.built.logits.get_submodule("score")
    head.register_forward_hook(lambda module, args, output: read.append((args[0].dtype, output.dtype)))
    half = model.score_steps(PROBLEMS, STEPS)
    assert read == [(torch.float32, torch.float32)]
    # The backbone is not: it is autocast as TRL's own reward models are
    assert half != by_itself(two_heads, LABELS)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed: bitsandbytes")
@pytest.mark.parametrize("preset", [LABELS, PAIR, RATIO], ids=lambda preset: preset.name)
def test_a_quantised_backbone_is_read_by_an_unquantised_head(preset, causal, reference, two_heads, tmp_path):
    import bitsandbytes

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    folder = two_heads if preset is LABELS else causal
    options = {"log_ratio_model": reference} if preset is RATIO else {}
    model = load(folder, preset, quantization_config=nf4, **options)
    model.prepare(Accelerator(cpu=True), None, None)
    backbone = model.scorer.backbone
    assert backbone.quantized
    quantised = [m for m in backbone.hidden_states.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 2 * 7

    @torch.no_grad()
    def hidden_and_logits(folder, ids):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double()
        return hidden, hidden @ model.lm_head.weight.double().T

    tokenizer = tiny_tokenizer()
    weights = load_file(f"{folder}/model.safetensors")
    for problem, steps, read in zip(PROBLEMS, STEPS, model.score_steps(PROBLEMS, STEPS), strict=True):
        ids = tokenizer.encode(problem + "".join(step + ";" for step in steps))
        at = [n for n, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(";")]
        hidden, logits = hidden_and_logits(folder, ids)
        if preset is LABELS:
            labels = hidden @ weights["score.weight"].double().T + weights["score.bias"].double()
            expected = labels.softmax(-1)[at, 1].tolist()
        elif preset is PAIR:
            expected = logits[:, tokenizer.convert_tokens_to_ids(["+", "-"])].softmax(-1)[at, 0].tolist()
        else:
            own, other = (z.log_softmax(-1) for z in (logits, hidden_and_logits(reference, ids)[1]))
            ratio = [float(own[t - 1, ids[t]] - other[t - 1, ids[t]]) for t in range(len(problem), len(ids))]
            expected = [sum(ratio[: end + 1 - len(problem)]) for end in at]
        assert read == pytest.approx(expected, abs=1e-4)
    unquantised = by_itself(folder, preset, **options)
    assert read != pytest.approx(unquantised[-1], abs=1e-3)
    if preset is not RATIO:
        with pytest.raises(ValueError, match="offload=True cannot move quantised weights"):
            load(folder, preset, quantization_config=nf4, offload=True).prepare(Accelerator(cpu=True), None, None)
