"""Who works on the logit rows, and how many tokens at a time."""

import logging

import pytest
import torch

from trl_grpo_ext.kl.divergences import DIVERGENCES, Divergence
from trl_grpo_ext.kl.fused import row_operations as choice
from trl_grpo_ext.kl.fused.chunks import HeadModel, HeadOptions, LogitsMemory, default_logits_bytes
from trl_grpo_ext.kl.fused.tiles import TileOperations


GPU = torch.device("cuda")
H100_BYTES = 80 * 10**9


@pytest.mark.parametrize("switch", [None, "1", "0"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("is_installed", [False, True])
def test_the_kernels_run_on_a_gpu_with_triton_unless_they_are_switched_off(monkeypatch, switch, device, is_installed):
    monkeypatch.setattr(choice, "find_spec", lambda name: object() if is_installed and name == "triton" else None)
    monkeypatch.delenv(choice.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(choice.SWITCH, switch)
    assert choice._runs_kernels(torch.device(device)) == (device == "cuda" and is_installed and switch != "0")


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv(choice.SWITCH, "off")
    with pytest.raises(ValueError, match="TRL_GRPO_EXT_TRITON must be 0 or 1, got 'off'"):
        choice.row_operations(torch.device("cpu"), torch.float32, DIVERGENCES["reverse"])


def test_float64_and_divergences_without_a_kernel_take_pytorch_and_the_latter_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(choice, "_runs_kernels", lambda device: True)
    reverse = DIVERGENCES["reverse"]
    own = Divergence(reverse.dense, reverse.means_, reverse.weighted_score_, "reference")
    with caplog.at_level(logging.WARNING):
        assert isinstance(choice.row_operations(GPU, torch.float64, reverse), TileOperations)
        assert not caplog.records
        for _ in range(2):
            assert isinstance(choice.row_operations(GPU, torch.bfloat16, own), TileOperations)
    (record,) = caplog.records
    assert "'reverse' and 'forward' only" in record.getMessage()


@pytest.mark.parametrize("vocabulary", [49_152, 152_064, 50_257])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_bytes", [None, 32 * 2**20])
def test_a_chunk_on_a_gpu_has_2048_tokens(vocabulary, itemsize, block_bytes):
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    memory = LogitsMemory(default_logits_bytes(vocabulary, itemsize, block_bytes, H100_BYTES), block_bytes)
    options = HeadOptions(1.0, 1.0, None, dtype, memory)
    hidden = torch.empty(5000, 8, dtype=dtype, device="meta")
    model = HeadModel(hidden, torch.empty(vocabulary, 8, dtype=dtype, device="meta"), None, options)
    chunks = [chunk for chunk, _ in model.chunks()]
    assert 2048 <= chunks[0].stop < 2200
    # Rows begin at multiples of 16 entries, for loads of 128 bits
    assert model.new_product_buffer().stride(0) % 16 == 0


def test_a_chunk_takes_an_eighth_of_a_small_gpu_at_most_and_256_mib_on_a_cpu():
    assert default_logits_bytes(152_064, 4, None, 8 * 2**30) == 2**30
    assert default_logits_bytes(152_064, 4, 2**20, None) == 256 * 2**20
