"""The door to TRL: what importing the package says beside a TRL that differs, and what is read of the fused head."""

import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_grpo_ext import _trl


WITHOUT_A_NAME = "del trl.trainer.utils.use_adapter"
WITHOUT_A_PACKAGE = "import sys; sys.modules['datasets'] = None; del sys.modules['trl.trainer.grpo_trainer']"
WITH_ANOTHER_SIGNATURE = (
    "def _compute_loss(self, model, inputs, num_items_in_batch): ...\n"
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss = _compute_loss"
)
WITH_ANOTHER_SOURCE = "def nanstd(tensor, dim=None, keepdim=False): ...\ntrl.trainer.utils.nanstd = nanstd"


@pytest.fixture
def import_after(forked_python):
    """Imports the package, in a process of its own, beside a TRL that a statement has changed."""

    def run(change):
        code = f"import trl.trainer.grpo_trainer, trl.trainer.utils\n{change}\nimport trl_grpo_ext\nprint('imported')"
        command = [forked_python, "-c", code]
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)

    return run


def test_the_head_settings_are_what_trl_resolved(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.logit_scale, model.config.final_logit_softcapping = 0.25, 30.0
    add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=True)
    assert _trl.head_settings(model.forward) == (0.7, 0.25, 30.0, True)


def test_importing_the_package_beside_a_trl_without_a_name_stops_with_the_name(import_after):
    done = import_after(WITHOUT_A_NAME)
    assert done.returncode == 1
    assert "ImportError: trl_grpo_ext extends TRL 1.16, and TRL" in done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("- ")] == ["- `use_adapter` is gone"]
    assert lines[-1] == "Install a matching version: `pip install 'trl>=1.16,<1.17'`."


def test_importing_the_package_beside_a_trl_that_lacks_a_package_says_what_trl_lacks(import_after):
    done = import_after(WITHOUT_A_PACKAGE)
    assert done.returncode == 1
    assert "datasets" in done.stderr.splitlines()[-1] and "extends TRL" not in done.stderr


def test_importing_the_package_beside_a_trl_with_another_signature_stops_with_the_difference(import_after):
    done = import_after(WITH_ANOTHER_SIGNATURE)
    assert done.returncode == 1
    assert "`GRPOTrainer._compute_loss` takes ['self', 'model', 'inputs', 'num_items_in_batch'] where" in done.stderr
    assert "is gone" not in done.stderr


def test_importing_the_package_beside_a_trl_with_another_source_warns_and_goes_on(import_after):
    done = import_after(WITH_ANOTHER_SOURCE)
    assert done.stdout == "imported\n", done.stderr
    assert "- `nanstd` cannot be read (the standard deviation of rewards): advantages/normalization.py" in done.stderr
