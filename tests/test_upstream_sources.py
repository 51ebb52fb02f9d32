"""Fingerprints of TRL's methods: the installed TRL's, blind to comments, changed by each change of meaning."""

import inspect
import linecache
import pkgutil
import textwrap
import warnings
from importlib.metadata import version
from itertools import count
from pathlib import Path

import pytest
from trl import GRPOTrainer

from trl_grpo_ext import _upstream_names as names
from trl_grpo_ext import _upstream_sources as sources
from trl_grpo_ext._upstream_sources import fingerprint


PACKAGE = Path(sources.__file__).parent
GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
UTILS = "trl.trainer.utils"
_numbers = count()


def short(name):
    return name.partition(":")[2]


def source_of(name):
    return inspect.getsource(inspect.unwrap(pkgutil.resolve_name(name)))


def compiled(name, source):
    """A function of TRL with another source, which can be read as that of a module can."""
    file = f"<{name} {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = dict(inspect.unwrap(pkgutil.resolve_name(name)).__globals__)
    exec(compile(source, file, "exec"), namespace)
    return namespace[name.rpartition(".")[2].rpartition(":")[2]]


def install(monkeypatch, name, old, new):
    """Put `new` in place of the one occurrence of `old` in a method or function of TRL, until the test ends."""
    source = textwrap.dedent(source_of(name))
    assert source.count(old) == 1
    separator = "." if "." in short(name) else ":"
    owner, _, attribute = name.rpartition(separator)
    function = compiled(name, source.replace(old, new))
    is_static = isinstance(inspect.getattr_static(pkgutil.resolve_name(owner), attribute), staticmethod)
    monkeypatch.setattr(pkgutil.resolve_name(owner), attribute, staticmethod(function) if is_static else function)


def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources.warn_of_changed_sources()
    return [str(warning.message) for warning in caught]


# ---------------------------------------------------------------------------------------------------------------------
# The installed TRL


def test_the_fingerprints_are_those_of_the_installed_trl():
    assert version("trl") == sources.COMPARED_VERSION
    assert {name: fingerprint(source_of(name)) for name in sources.MIRRORED} == sources.FINGERPRINTS
    assert sources.changed_sources() == {} and warned() == []


def test_files_in_which_nothing_has_changed_are_not_parsed(monkeypatch):
    parsed = []
    monkeypatch.setattr(sources, "fingerprint", parsed.append)
    assert sources.changed_sources() == {} and parsed == []
    monkeypatch.setattr(sources, "FILE_DIGESTS", [])
    sources.changed_sources()
    assert len(parsed) == len(sources.MIRRORED)


def test_what_is_printed_for_a_new_version_is_the_block_of_the_file(capsys):
    sources.print_fingerprints()
    printed = {}
    exec(capsys.readouterr().out, printed)
    assert printed["COMPARED_VERSION"] == sources.COMPARED_VERSION
    assert printed["FINGERPRINTS"] == sources.FINGERPRINTS
    assert printed["FILE_DIGESTS"] == sources.FILE_DIGESTS


@pytest.mark.parametrize("name", sources.MIRRORED, ids=short)
def test_each_row_names_files_that_exist(name):
    assert [file for file in sources.MIRRORED[name].files if not (PACKAGE / file).is_file()] == []


def test_every_method_of_trl_that_is_overridden_has_a_fingerprint():
    overridden = {name for name in names._PARAMETERS if name.startswith(f"{GRPO}.")}
    assert overridden <= set(sources.MIRRORED)


# ---------------------------------------------------------------------------------------------------------------------
# The fingerprint

SAMPLE = '''\
@decorator(1e-4)
def reduce(self, loss, *, mask=None):
    """What it does."""
    # Why
    if mask is not None:
        loss = loss * mask  # broadcast
        total = mask.sum().clamp(min=1.0)
    else:
        total = 1
    name = f"loss/{self.mode!r}: {loss:.3f}" "# no comment"
    return {**self.log, name: (loss.sum() / total)}
'''


def test_a_fingerprint_is_the_same_for_every_version_of_python():
    assert fingerprint(SAMPLE) == "48d8da78df60"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    # Why\n", ""),
        ("    # Why\n", "    # Another reason\n\n\n"),
        ("  # broadcast", ""),
        ('    """What it does."""\n', ""),
        ('"""What it does."""', '"""\n    What it does.\n\n    With an example.\n    """'),
        ("self, loss, *, mask=None", "\n    self,\n    loss,\n    *,\n    mask=None,\n"),
        ("(loss.sum() / total)", "loss.sum()/total"),
        ('"# no comment"', "'# no comment'"),
    ],
)
def test_comments_docstrings_and_layout_do_not_change_it(old, new):
    edited = SAMPLE.replace(old, new)
    assert edited != SAMPLE and fingerprint(edited) == fingerprint(SAMPLE)
    assert fingerprint(textwrap.indent(edited, "    ")) == fingerprint(SAMPLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-4", "1e-5"),
        ("def reduce", "async def reduce"),
        ("@decorator(1e-4)\n", ""),
        ("mask=None", "mask=0"),
        ("*, mask", "mask"),
        ("is not None", "is None"),
        ("loss * mask", "mask * loss"),
        ("        total = mask", "    total = mask"),
        ("clamp(min=1.0)", "clamp(min=1)"),
        ("clamp(min=1.0)", "clamp(max=1.0)"),
        (".3f", ".4f"),
        ("!r", ""),
        ("# no comment", "# a comment"),
        ("**self.log, name", "name"),
        ("total", "count"),
    ],
)
def test_every_other_change_does(old, new):
    edited = SAMPLE.replace("    else:\n        total = 1\n", "") if old.startswith("        total") else SAMPLE
    assert fingerprint(edited.replace(old, new)) != fingerprint(edited)


def test_the_order_of_statements_and_the_strings_inside_count():
    lines = SAMPLE.splitlines(keepends=True)
    lines[5], lines[6] = lines[6], lines[5]
    assert fingerprint("".join(lines)) != fingerprint(SAMPLE)
    nested = '    def f(self):\n        return """\nfrom the first column"""\n'
    assert fingerprint(nested) != fingerprint(nested.replace("\nfrom", "\n    from"))


# ---------------------------------------------------------------------------------------------------------------------
# Changes of TRL's meaning that keep all names

READ = '    old_per_token_logps = inputs.get("old_per_token_logps")\n'
FORWARD = "    # Compute the per_token_logps and the entropy at each position in the completion\n"

MUTATIONS = {
    # As it was until TRL 1.9
    "luspo's reduction": (
        f"{GRPO}._compute_loss",
        "loss = (per_token_loss * mask).sum(-1).mean()",
        "loss = (per_token_loss * mask.sum(1, keepdim=True)).mean()",
        "loss.py",
    ),
    # As it was until TRL 1.9
    "dapo's window": (
        f"{GRPO}._compute_loss",
        "normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
        "pass",
        "loss.py",
    ),
    "k3": (
        f"{GRPO}._compute_loss",
        "torch.exp(ref_per_token_logps - per_token_logps) - (ref_per_token_logps - per_token_logps) - 1",
        "torch.exp(per_token_logps - ref_per_token_logps) - (per_token_logps - ref_per_token_logps) - 1",
        "kl/estimates.py",
    ),
    "k3's ratio": (
        f"{GRPO}._compute_loss",
        "per_token_kl = per_token_kl * coef_1",
        "per_token_kl = per_token_kl * coef_1.detach()",
        "kl/estimates.py",
    ),
    "the ratio of the sequence": (
        f"{GRPO}._compute_loss",
        "(log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)",
        "(log_ratio * mask).sum(-1)",
        "loss.py",
    ),
    "the epsilon of the advantages": (
        f"{GRPO}._generate_and_score_completions",
        "advantages = advantages / (std_rewards + 1e-4)",
        "advantages = advantages / (std_rewards + 1e-6)",
        "advantages/normalization.py",
    ),
    "the order of aggregation": (
        f"{GRPO}._generate_and_score_completions",
        "reward_k = (grouped - mean_k) / (std_k + 1e-4)",
        "reward_k = (grouped - mean_k) / (std_rewards + 1e-4)",
        "advantages/combine.py",
    ),
    "the standard deviation": (
        f"{UTILS}:nanstd",
        "correction = count / (count - 1)",
        "correction = count / count",
        "advantages/normalization.py",
    ),
    "the order of cap and scale": (
        "trl.kernels.chunked_logprob:_torch_transform",
        "z = z * logit_scale\n    if HAS_SOFTCAP:\n        z = softcap * torch.tanh(z / softcap)",
        "if HAS_SOFTCAP:\n        z = softcap * torch.tanh(z / softcap)\n    z = z * logit_scale",
        "kl/fused/chunks.py",
    ),
    "the mixing of the reference": (
        "trl.trainer.callbacks:SyncRefModelCallback._sync_target_model",
        "mul_(1.0 - alpha).add_(copy_param.data, alpha=alpha)",
        "mul_(alpha).add_(copy_param.data, alpha=1.0 - alpha)",
        "kl/reference.py",
    ),
    "when a batch is generated": (
        f"{GRPO}._prepare_inputs",
        "self._step % generate_every == 0",
        "self._step % generate_every == 1",
        "checkpoints/trainer.py",
    ),
    "when a step counts": (f"{GRPO}.training_step", "self._step += 1", "self._step += 2", "checkpoints/trainer.py"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_change_of_meaning_is_named_with_our_file(mutation, monkeypatch):
    name, old, new, file = MUTATIONS[mutation]
    install(monkeypatch, name, old, new)
    names.check_names()
    assert list(sources.changed_sources()) == [name]
    (warning,) = warned()
    (line,) = [line for line in warning.splitlines() if line.startswith("- ")]
    assert line.startswith(f"- `{short(name)}` differs") and file in line.rpartition(": ")[2].split(", ")
    assert f"TRL {sources.COMPARED_VERSION}" in warning and f"pip install trl=={sources.COMPARED_VERSION}" in warning


def test_old_log_probs_that_are_read_before_the_forward_pass_are_noticed(monkeypatch):
    """GSPO-token replaces them during that pass."""
    name = f"{GRPO}._compute_loss"
    source = textwrap.dedent(source_of(name))
    assert source.count(READ) == source.count(FORWARD) == 1 and source.index(FORWARD) < source.index(READ)
    moved = source.replace(READ, "").replace(FORWARD, READ + FORWARD)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compiled(name, moved))
    names.check_names()
    assert sources.changed_sources() == {name: "differs"}
    assert {"loss.py", "kl/trainer.py"} <= set(sources.MIRRORED[name].files)


def test_a_comment_in_trl_is_not_a_change(monkeypatch):
    ratio = "coef_1 = torch.exp(log_importance_weights)"
    install(monkeypatch, f"{GRPO}._compute_loss", ratio, ratio.replace("(", "(  # the ratio\n        "))
    assert sources.changed_sources() == {} and warned() == []


# ---------------------------------------------------------------------------------------------------------------------
# Sources that cannot be had


def test_a_source_that_cannot_be_read_or_is_gone_is_said(monkeypatch):
    namespace = {}
    exec("def training_step(self, model, inputs, num_items_in_batch): self._step += 1", namespace)
    monkeypatch.setattr(GRPOTrainer, "training_step", namespace["training_step"])
    monkeypatch.setattr(GRPOTrainer, "compute_loss", len)
    monkeypatch.delattr("trl.trainer.utils.nanstd")
    assert sources.changed_sources() == {
        f"{GRPO}.training_step": "cannot be read",
        f"{GRPO}.compute_loss": "cannot be read",
        f"{UTILS}:nanstd": "cannot be found",
    }
    (warning,) = warned()
    assert "- `nanstd` cannot be found (" in warning and "- `GRPOTrainer.compute_loss` cannot be read (" in warning
