"""Recipes for large models: each YAML in one step on a tiny stand-in, the memory table, the step of the 7B shape."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpo
import memory
import model_bytes
import pytest
import torch
import trl.trainer.grpo_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from tests.support.hub_folders import save_hub_folder
from tests.support.training import Recorder
from trl_grpo_ext import ProcessRewardModel


RECIPES = Path(__file__).parents[2] / "recipes"


CONFIGS = sorted((RECIPES / "configs").glob("qwen2.5_7b_*.yaml"))
PRM = "Qwen2.5-Math-PRM-7B"
# What bitsandbytes can pack for a CPU
WIDTH = 64
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 128}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
# What a step on a CPU in a second needs changed
SMALL = """
    --use_cpu true --bf16 false --dtype float32 --max_steps 1 --warmup_steps 0 --save_strategy no
    --max_completion_length 12 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 4
    --dataset_options {"size":16,"seed":1} --lora_r 2
""".split()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Folders named as the models on the Hub, tiny, of their architectures."""
    root = tmp_path_factory.mktemp("hub")
    save_hub_folder(root / "Qwen2.5-7B-Instruct", "bytes", "Qwen2ForCausalLM", **SIZES)
    mlp = {"score.0.weight": (WIDTH, WIDTH), "score.0.bias": (WIDTH,)}
    mlp |= {"score.2.weight": (2, WIDTH), "score.2.bias": (2,)}
    save_hub_folder(root / PRM, "bytes", "Qwen2ForProcessRewardModel", head=mlp, lm_head=True, seed=1, **SIZES)
    return root


def parse(config: Path, hub: Path, *more: str):
    """The recipe's own parser, with the stand-ins in place of the ids."""
    own = grpo.make_parser().parse_args_and_config(["--config", str(config), "--use_cpu", "true", "--bf16", "false"])
    sources = [str(hub / spec.split("/")[-1]) if grpo.looks_like_model(spec) else spec for spec in own[0].reward_funcs]
    options = own[0].reward_model_options
    if "quantization_config" in options:
        # CPUs are slow in bfloat16
        options = {**options, "quantization_config": {**options["quantization_config"], **NF4}}
    replaced = [
        "--model_name_or_path",
        str(hub / own[2].model_name_or_path.split("/")[-1]),
        "--reward_funcs",
        *sources,
    ]
    replaced += ["--reward_model_options", json.dumps(options)]
    return grpo.make_parser().parse_args_and_config(["--config", str(config), *replaced, *SMALL, *more])


def needs_bitsandbytes(config: Path) -> None:
    if "qlora" in config.stem:
        pytest.importorskip("bitsandbytes")


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantised_bytes(model: torch.nn.Module) -> int:
    """Parameters of a model and what bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += bytes_of([parameter])
        state = vars(parameter).get("quant_state")
        if state is not None:
            total += bytes_of(value for value in state.as_dict(packed=False).values() if torch.is_tensor(value))
            total += 4 if state.nested else 0  # the offset, which is listed as a number
    return total


# --- Configurations --------------------------------------------------------------------------------------------------


def test_there_is_a_config_for_each_way_of_running():
    names = {path.stem.removeprefix("qwen2.5_7b_") for path in CONFIGS}
    assert names == {"lora", "lora_8gpus", "qlora", "vllm_colocate", "vllm_server"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_step_of_every_config_on_a_tiny_model(path, hub, tmp_path):
    needs_bitsandbytes(path)
    trainer = grpo.make_trainer(*parse(path, hub, "--use_vllm", "false", "--output_dir", str(tmp_path)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    model = trainer.reward_funcs[0]
    assert isinstance(model, ProcessRewardModel) and model.preset.name == "qwen-math-prm"
    log = trainer.state.log_history[0]
    assert 0 <= log["kl"] < 1e-8
    assert log["grad_norm"] > 0
    assert 0 < log[f"rewards/{PRM}/step_mean"] + 0.5 < 1  # clip: min(p - 0.5, 0)
    assert "rewards/task_score/mean" in log
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    quantised = "qlora" in path.stem
    assert model.scorer.backbone.quantized == quantised
    assert vars(trainer.model.get_base_model()).get("is_loaded_in_4bit", False) == quantised


class RecordedVLLM:
    """Stands in for TRL's `VLLMGeneration`: notes what it is built with."""

    def __init__(self, **keywords: Any):
        self.keywords = keywords
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "qwen2.5_7b_vllm_colocate",
            {
                "mode": "colocate",
                "gpu_memory_utilization": 0.4,
                "tensor_parallel_size": 1,
                "max_model_length": 2048,
                "enable_sleep_mode": True,
            },
        ),
        (
            "qwen2.5_7b_vllm_server",
            {"mode": "server", "server_host": "127.0.0.1", "server_port": 8000, "server_timeout": 600.0},
        ),
    ],
)
def test_what_trl_would_build_vllm_with(name, expected, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", RecordedVLLM)
    recipe = parse(RECIPES / "configs" / f"{name}.yaml", hub, "--output_dir", str(tmp_path))
    trainer = grpo.make_trainer(*recipe)
    built = trainer.vllm_generation.keywords
    assert {key: built[key] for key in expected} == expected
    assert built["max_completion_length"] == 12 and built["model"] is trainer.model


def test_options_of_reward_models_reach_them(hub, tmp_path):
    options = {"dtype": "bfloat16", "batch_tokens": 77}
    more = ("--reward_model_options", json.dumps(options), "--use_vllm", "false", "--output_dir", str(tmp_path))
    trainer = grpo.make_trainer(*parse(RECIPES / "configs" / "qwen2.5_7b_lora_8gpus.yaml", hub, *more))
    model = trainer.reward_funcs[0]
    assert next(model.scorer.backbone.parameters()).dtype == torch.bfloat16
    assert trainer.model.dtype == torch.float32


# --- Memory ----------------------------------------------------------------------------------------------------------


def sizes(recipe, **memory_fields: Any) -> dict[str, int]:
    return {part.name: part.size for part in memory.parts(memory.MemoryArguments(**memory_fields), *recipe)}


@pytest.mark.parametrize("name", ["qwen2.5_7b_lora", "qwen2.5_7b_qlora"])
def test_parts_are_the_bytes_of_a_run(name, hub, tmp_path):
    path = RECIPES / "configs" / f"{name}.yaml"
    needs_bitsandbytes(path)
    recipe = parse(path, hub, "--output_dir", str(tmp_path))
    expected = sizes(recipe)
    trainer = grpo.make_trainer(*recipe)
    batches: list[dict[str, Any]] = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()

    adapters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert expected["adapters"] == bytes_of(adapters)
    assert expected["gradients"] == bytes_of(recorder.gradients[0].values())
    assert expected["policy weights"] == quantised_bytes(trainer.model) - bytes_of(adapters)
    states = [state for of in trainer.optimizer.state.values() for key, state in of.items() if key != "step"]
    assert expected["optimiser (AdamW)"] == bytes_of(states)
    (batch,) = batches
    assert expected["cached reference states"] == bytes_of([batch["ref_hidden_states"]])
    scorer = trainer.reward_funcs[0].scorer
    if name == "qwen2.5_7b_lora":
        assert expected[f"reward model {PRM}"] == bytes_of(scorer.parameters())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_weights(nested, hub):
    pytest.importorskip("bitsandbytes")
    folder = hub / "Qwen2.5-7B-Instruct"
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=nested)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    shape = model_bytes.on_meta(model.config, AutoModelForCausalLM)
    assert model_bytes.weight_bytes(shape, shape.lm_head, quantization, 4) == quantised_bytes(model)


@pytest.mark.parametrize("tokens", [32, 128])
def test_activations_of_a_layer_are_near_what_autograd_keeps(tokens):
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=640,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=r".*_proj"))
    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Held, so that no later tensor takes the place
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), saved:
        model.model.layers[0](hidden, position_embeddings=rotary)
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    assert model_bytes.layer_bytes(config, tokens, 2) == pytest.approx(measured, rel=0.1)


def test_shards_of_the_accelerate_configs():
    read = lambda name: memory.Shards.read(str(RECIPES / "accelerate_configs" / f"{name}.yaml"))  # noqa: E731
    assert read("single_gpu") == read("ddp") == memory.Shards()
    assert read("fsdp2") == memory.Shards(8, 8, 8)
    assert read("zero2") == memory.Shards(1, 8, 8, master_weights=True)
    assert read("zero3") == memory.Shards(8, 8, 8, 8, master_weights=True)


def test_sharded_parts_are_an_eighth(hub):
    recipe = parse(RECIPES / "configs" / "qwen2.5_7b_lora_8gpus.yaml", hub)
    alone = sizes(recipe)
    for name, cut in (("fsdp2", 1), ("zero3", 8)):
        shared = sizes(recipe, accelerate_config=str(RECIPES / "accelerate_configs" / f"{name}.yaml"))
        assert shared["policy weights"] == alone["policy weights"] // 8
        assert shared[f"reward model {PRM}"] == alone[f"reward model {PRM}"] // cut


def test_peak_is_what_stays_and_the_largest_phase():
    found = [memory.Part(*row) for row in (("a", 5, "always"), ("b", 3, "scoring"), ("c", 4, "training"))]
    assert memory.peak(found) == 9
    assert memory.peak([*found, memory.Part("d", 2, "scoring")]) == 10


# --- The 7B shape ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_nf4():
    pytest.importorskip("bitsandbytes")
    import random_nf4

    return random_nf4


def test_shape_of_qwen2_5_7b(random_nf4):
    model = model_bytes.on_meta(random_nf4.QWEN2_5_7B, AutoModelForCausalLM)
    # The number of parameters on the model's card
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512


@pytest.fixture(scope="module")
def tiny_folder(random_nf4, tmp_path_factory) -> Path:
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    fields = {**random_nf4.QWEN2_5_7B.to_dict(), **sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("random") / "tiny_nf4"
    random_nf4.save_random_model(folder, Qwen2Config(**{**fields, "layer_types": None}))
    return folder


def test_folder_loads_as_the_model_quantised_while_loading(random_nf4, tiny_folder, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_config(
        Qwen2Config.from_dict({**model.config.to_dict(), "quantization_config": None})
    )
    state = {}
    for name, parameter in model.named_parameters():
        quantised = "quant_state" in vars(parameter)
        data = dequantize_4bit(parameter.data, vars(parameter)["quant_state"]) if quantised else parameter.data
        state[name] = data
        assert quantised == ("_proj.weight" in name)
    whole.load_state_dict(state)
    input_ids = torch.arange(12)[None]
    with torch.no_grad():
        # In evaluation mode bitsandbytes would turn to bfloat16 on some CPUs
        torch.testing.assert_close(
            model.train()(input_ids).logits, whole.train()(input_ids).logits, rtol=1e-4, atol=1e-4
        )


def test_step_of_the_7b_shape_on_a_tiny_one(tiny_folder):
    import seven_billion

    seven_billion.prepare(tiny_folder)
    parts, trainer, log = seven_billion.run(seven_billion.command_line(tiny_folder, 8))
    assert {"load", "generation", "reference", "loss, forward", "loss, backward"} <= parts.seconds.keys()
    assert log["rewards/odd_steps/steps"] == 2
    assert dataclasses.asdict(trainer.args)["kl_estimator"] == "exact"
    assert trainer.num_generations == 4
