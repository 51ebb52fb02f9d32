"""
Fingerprints of the sources of TRL's methods that this package mirrors, or whose order it depends on.

A method can keep all its names and mean something else: another reduction, another epsilon, `old_per_token_logps` read
before the forward pass. So the source of each such method has a fingerprint, which comments, docstrings and layout do
not change. At import a source that differs is a warning that names the method and the files of this package that have
to be read again. Whether the difference matters is for a reader, and the parity tests, to say.

For a new version of TRL:

1. Import this package. An `ImportError` lists the names to adapt in `_upstream_names.py`. A warning lists the methods
   to read again, and the files that mirror them.
2. Run the parity tests.
3. `python -c "import trl_grpo_ext._upstream_sources as s; s.print_fingerprints()"` prints the block below anew.
4. Change `SUPPORTED_TRL` in `_upstream_names.py`, and the version in `pyproject.toml` and the README.

Not seen: what these methods call, unless it is listed too (so no Triton kernel), and a wrapper that another library
puts around a method.
"""

import ast
import hashlib
import inspect
import pkgutil
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


# ---------------------------------------------------------------------------------------------------------------------
# Printed by `print_fingerprints`

COMPARED_VERSION = "1.16.0"

# Files in which nothing has changed
FILE_DIGESTS = ["1c3dc2253fb3", "20ae5bbfeca3", "3d7de1a28d39", "839b28adba1d", "a3c44bd9e7f3"]

FINGERPRINTS = {
    "trl.trainer.grpo_trainer:GRPOTrainer.__init__": "7d477239f4ae",
    "trl.trainer.grpo_trainer:GRPOTrainer._tokenize_prompts": "821c4b112f7f",
    "trl.trainer.grpo_trainer:GRPOTrainer._generate": "9194dd69c704",
    "trl.trainer.grpo_trainer:GRPOTrainer._tool_call_loop": "dc0624914dd5",
    "trl.trainer.grpo_trainer:GRPOTrainer._get_train_sampler": "42d184f55584",
    "trl.trainer.grpo_trainer:GRPOTrainer._prepare_inputs": "57987e888f2d",
    "trl.trainer.grpo_trainer:GRPOTrainer.training_step": "59569db2dabc",
    "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards": "4fd50b2cfcf3",
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": "a37548aa2a3c",
    "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies": "b7c50ba04061",
    "trl.trainer.grpo_trainer:GRPOTrainer.compute_loss": "9d7b010cb255",
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": "e9b28e571008",
    "trl.trainer.grpo_trainer:GRPOTrainer.log": "10258620a731",
    "trl.trainer.grpo_trainer:GRPOTrainer._save_checkpoint": "0c7b2c2e94d5",
    "trl.trainer.callbacks:SyncRefModelCallback._sync_target_model": "d3361d4697c3",
    "trl.trainer.callbacks:SyncRefModelCallback.sync_target_model": "39a3189acc60",
    "trl.trainer.callbacks:SyncRefModelCallback.on_step_end": "a0c2e6c25238",
    "trl.trainer.utils:add_fused_lm_head": "1a9b29af74fd",
    "trl.trainer.utils:print_prompt_completions_sample": "456182b89c45",
    "trl.trainer.utils:RepeatSampler.__iter__": "5537f241d9ad",
    "trl.trainer.utils:nanstd": "8ecab663060f",
    "trl.trainer.utils:split_tensor_dict": "9cf9b07a7d16",
    "trl.trainer.utils:shuffle_sequence_dict": "b75e1ab209d3",
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward": "b2894db050a6",
    "trl.kernels.chunked_logprob:_torch_transform": "8d5c584241e0",
    "trl.scripts.grpo:main": "6f78d8c2aee5",
}

# ---------------------------------------------------------------------------------------------------------------------


class Mirrored(NamedTuple):
    """
    What this package takes from one method of TRL.

    Args:
        what (`str`):
            What is mirrored or relied on.
        files (`tuple[str, ...]`):
            The files of this package to read again when the method changes.
    """

    what: str
    files: tuple[str, ...]


_TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer"
_CALLBACK = "trl.trainer.callbacks:SyncRefModelCallback"

MIRRORED = {
    f"{_TRAINER}.__init__": Mirrored(
        "the reference model or adapter, the names of reward functions, and when the fused head is added",
        ("trainer.py", "kl/trainer.py", "kl/reference.py", "kl/cached_reference.py"),
    ),
    f"{_TRAINER}._tokenize_prompts": Mirrored("prompts as lists of token ids", ("trainer.py",)),
    f"{_TRAINER}._generate": Mirrored(
        "the order of what it returns, the mask of the policy's tokens among it", ("trainer.py", "rewards/turns.py")
    ),
    f"{_TRAINER}._tool_call_loop": Mirrored(
        "one message for each turn of the policy, and the order of tool results", ("rewards/turns.py",)
    ),
    f"{_TRAINER}._get_train_sampler": Mirrored("which sampler orders the prompts", ("checkpoints/trainer.py",)),
    f"{_TRAINER}._prepare_inputs": Mirrored(
        "when a batch is generated, how it is cut into micro-batches, and where they are kept",
        ("kl/trainer.py", "checkpoints/trainer.py"),
    ),
    f"{_TRAINER}.training_step": Mirrored(
        "`_step` counts micro-batches after their update", ("checkpoints/trainer.py",)
    ),
    f"{_TRAINER}._calculate_rewards": Mirrored(
        "how reward functions are called, and the gathered order of their rewards",
        ("scoring.py", "rewards/sources.py", "rewards/scored_batch.py"),
    ),
    f"{_TRAINER}._generate_and_score_completions": Mirrored(
        "the scalar advantages, the keys of the batch, and the passes of policy and reference",
        (
            *("trainer.py", "advantages/combine.py", "advantages/normalization.py", "rewards/scored_batch.py"),
            *("kl/trainer.py", "kl/cached_reference.py"),
        ),
    ),
    f"{_TRAINER}._get_per_token_logps_and_entropies": Mirrored(
        "how the model is called, in which slices, and with which labels",
        ("loss.py", "kl/model_forward.py", "kl/cached_reference.py"),
    ),
    f"{_TRAINER}.compute_loss": Mirrored("nothing is done to the loss after `_compute_loss`", ("kl/trainer.py",)),
    f"{_TRAINER}._compute_loss": Mirrored(
        "the loss mask, the ratio, the KL, the reductions, and that old log-probs are read after the forward pass",
        ("loss.py", "kl/trainer.py", "kl/estimates.py"),
    ),
    f"{_TRAINER}.log": Mirrored(
        "metrics are averaged between logs, and the table of completions is printed apart from all else",
        ("trainer.py", "kl/trainer.py", "metrics.py", "credit/trainer.py"),
    ),
    f"{_TRAINER}._save_checkpoint": Mirrored("what is written, and when", ("checkpoints/trainer.py",)),
    f"{_CALLBACK}._sync_target_model": Mirrored(
        "how the reference moves towards the policy", ("kl/reference.py", "distributed.py")
    ),
    f"{_CALLBACK}.sync_target_model": Mirrored(
        "ZeRO-3 shards are gathered for it", ("kl/reference.py", "distributed.py")
    ),
    f"{_CALLBACK}.on_step_end": Mirrored(
        "after which steps the reference moves", ("kl/reference.py", "kl/trainer.py")
    ),
    "trl.trainer.utils:add_fused_lm_head": Mirrored(
        "the fused forward of the policy, and how a config scales its logits", ("_trl.py", "kl/model_forward.py")
    ),
    "trl.trainer.utils:print_prompt_completions_sample": Mirrored(
        "with no sample to print it prints nothing; what of a completion is printed, and how samples are drawn",
        ("credit/trainer.py", "credit/step_table.py"),
    ),
    "trl.trainer.utils:RepeatSampler.__iter__": Mirrored(
        "an epoch's order is drawn when the epoch starts", ("checkpoints/trainer.py",)
    ),
    "trl.trainer.utils:nanstd": Mirrored("the standard deviation of rewards", ("advantages/normalization.py",)),
    "trl.trainer.utils:split_tensor_dict": Mirrored(
        "every key of a batch is cut into micro-batches, ours too", ("kl/trainer.py",)
    ),
    "trl.trainer.utils:shuffle_sequence_dict": Mirrored(
        "every key of a batch is shuffled alike, ours too", ("kl/trainer.py",)
    ),
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward": Mirrored(
        "the dtype of the logits and where the bias is added", ("kl/fused/chunks.py",)
    ),
    "trl.kernels.chunked_logprob:_torch_transform": Mirrored(
        "scale, soft cap and temperature of the logits, in this order", ("kl/fused/chunks.py",)
    ),
    "trl.scripts.grpo:main": Mirrored(
        "the order of its arguments, and that it imports the trainer from `trl` when it runs", ("cli.py",)
    ),
}


def fingerprint(source: str) -> str:
    """
    Digest of a function's syntax tree without docstrings: other comments and another layout do not change it.

    Python 3.10 to 3.13 give the same digest: their trees differ in fields that are empty, which are left out.

    Args:
        source (`str`):
            The function's source with its decorators, indented or not.
    """
    # A method is indented; to dedent the text would change the strings in it too
    tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    definitions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for definition in definitions:
        if ast.get_docstring(definition, clean=False) is not None:
            del definition.body[0]
    return hashlib.sha256(repr(_shape(definitions[0])).encode()).hexdigest()[:12]


def _shape(node: Any) -> Any:
    """A syntax tree as nested lists, without the fields that are empty."""
    if isinstance(node, ast.AST):
        return [type(node).__name__, *([name, _shape(x)] for name, x in ast.iter_fields(node) if x not in (None, []))]
    return [_shape(child) for child in node] if isinstance(node, list) else node


def changed_sources() -> dict[str, str]:
    """What is different about each method in [`MIRRORED`] whose source is not the one that was compared, by name."""
    changes = {name: _change(name) for name in MIRRORED}
    return {name: change for name, change in changes.items() if change}


def _change(name: str) -> str:
    try:
        function = inspect.unwrap(pkgutil.resolve_name(name))
        # Most imports end here, which spares them reading and parsing 3,000 lines of TRL
        if _file_digest(inspect.getfile(function)) in FILE_DIGESTS:
            return ""
        return "" if fingerprint(inspect.getsource(function)) == FINGERPRINTS[name] else "differs"
    except (ImportError, AttributeError):
        return "cannot be found"
    # A compiled function has no source, and that of an archive may be left out
    except (OSError, TypeError):
        return "cannot be read"


@cache
def _file_digest(path: str) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if Path(path).is_file() else None


def warn_of_changed_sources() -> None:
    """Warn once, naming each method of TRL whose source is not the one that was compared, and our files."""
    changes = changed_sources()
    if not changes:
        return
    lines = [
        f"- `{name.partition(':')[2]}` {change} ({MIRRORED[name].what}): {', '.join(MIRRORED[name].files)}"
        for name, change in changes.items()
    ]
    warnings.warn(
        f"trl_grpo_ext was compared with TRL {COMPARED_VERSION}. In this TRL {version('trl')} the source of some "
        "methods that it mirrors or relies on is another, or cannot be read; after each, the files of trl_grpo_ext "
        "that it concerns:\n" + "\n".join(lines) + "\nWhether results change is not known. Run "
        f"`pytest tests/trainer/test_parity.py tests/test_loss.py`, or `pip install trl=={COMPARED_VERSION}`.",
        UserWarning,
        stacklevel=2,
    )


def print_fingerprints() -> None:
    """Print the block of this file that holds the version of the installed TRL and its digests."""
    functions = {name: inspect.unwrap(pkgutil.resolve_name(name)) for name in MIRRORED}
    files = sorted({inspect.getfile(function) for function in functions.values()})
    print(f'COMPARED_VERSION = "{version("trl")}"')
    print("\n# Files in which nothing has changed")
    print(f"FILE_DIGESTS = {sorted(digest for path in files if (digest := _file_digest(path)))}")
    print("\nFINGERPRINTS = {")
    for name, function in functions.items():
        print(f'    "{name}": "{fingerprint(inspect.getsource(function))}",')
    print("}")
