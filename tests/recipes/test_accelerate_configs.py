"""The configs for `accelerate launch` say what their names say, to accelerate's own loader."""

from typing import Any

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

from tests.support.launching import CONFIGS


def load(name: str) -> Any:
    return load_config_from_file(str(CONFIGS / f"{name}.yaml"))


DESCRIPTIONS = {
    "single_gpu": (DistributedType.NO, {}),
    "ddp": (DistributedType.MULTI_GPU, {}),
    "fsdp2": (DistributedType.FSDP, {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
    "zero2": (DistributedType.DEEPSPEED, {"zero_stage": 2, "zero3_init_flag": False}),
    "zero3": (DistributedType.DEEPSPEED, {"zero_stage": 3, "zero3_init_flag": True}),
}
TWINS = ["fsdp2", "zero2", "zero3"]


def test_all_configs_are_described():
    assert {path.stem for path in CONFIGS.iterdir()} == {*DESCRIPTIONS, *(f"cpu_{name}" for name in TWINS)}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_for_gpus(name):
    config, (distributed_type, settings) = load(name), DESCRIPTIONS[name]
    assert config.distributed_type == distributed_type
    assert (config.fsdp_config | config.deepspeed_config).items() >= settings.items()
    assert config.num_processes == (1 if name == "single_gpu" else 8)
    assert config.num_machines == 1
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu


@pytest.mark.parametrize("name", TWINS)
def test_cpu_twin_differs_in_processes_and_precision_only(name):
    config, twin = load(name), load(f"cpu_{name}")
    assert (twin.num_processes, twin.mixed_precision) == (2, "no")
    # It would leave DeepSpeed out
    assert twin.use_cpu == (name == "fsdp2")
    same = {"num_processes": 2, "mixed_precision": "no", "use_cpu": twin.use_cpu}
    assert vars(config) | same == vars(twin)
