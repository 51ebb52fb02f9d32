"""
The columns of the log of credit, one row for each completion.

| column | holds |
|---|---|
| `step` | optimizer step that trains on the batch first; in evaluation the steps done before |
| `mode` | `"train"` or `"eval"` |
| `prompt` | text of the prompt as the policy reads it, special tokens included |
| `group` | number of the prompt in the generated batch |
| `completion` | number of the completion in its group |
| `token_ids` | ids of the completion's tokens |
| `tokens` | their texts, which join to the completion. A character with bytes in several tokens belongs to the last |
| `loss_mask` | whether a token is trained on |
| `advantages` | as they were trained on; under outcome supervision the completion's one on every token |
| `trainer_logprobs` | log-probs of the tokens in the first update on the batch |
| `old_logprobs` | those that the ratio of this update divides by |
| `ref_logprobs` | log-probs under the reference |
| `inference_logprobs` | those of the engine that sampled the tokens, if it is another |
| `entropy` | of each next-token distribution, nats |
| `kl` | KL to the reference of the estimator in use, nats, as the loss reduces it |
| `truncated` | whether the completion reached the largest length without an end-of-sequence token |
| `explained` | whether the sources' `share`s and the `offset` add up to the advantages. If not, they are null |
| `offset` | part of the advantages that no source adds: the batch's mean in `"normalize_then_sum"` |
| `batch_divisor` | what `"normalize_then_sum"` divides the sum over the sources by; else 1 |
| `step_ends` | tokens that end a step of any source of step rewards |
| `sources` | a list with one entry for each reward source, as below |

Each of the `sources`:

| field | holds |
|---|---|
| `name`, `weight`, `gamma`, `transform`, `gate` | its settings |
| `is_steps` | whether it has judged steps or tokens, not the completion as a whole |
| `ends` | token that ends each step; of one number for the completion its last loss token |
| `returned` | rewards of these steps as the source returned them, null where it gave none; on one token their sum |
| `transformed` | the same after the source's transform |
| `withheld` | whether its gate keeps all of them from counting |
| `reward` | on tokens: the rewards that count, after transform, gate and loss mask |
| `shaped` | the same as the estimator shapes them, which only `"min"` does |
| `return` | on tokens: see below |
| `mean`, `std`, `divisor` | on tokens: what is compared with. Without spread, `divisor` is null |
| `share` | on tokens: what the source adds to the advantage |

`advantages[t] = offset + sum over sources of share[t]`. With an estimator that normalises returns (`"position"`,
`"min"`), `return` is the discounted sum of `shaped`, and

    share[t] = weight * (return[t] - mean[t]) / divisor[t] / batch_divisor

With one that normalises step rewards (`"pooled"`, `"step"`), `mean` and `divisor` are on tokens with a reward,
`return` is the discounted sum of `(shaped - mean) / divisor`, and

    share[t] = weight * return[t] / batch_divisor

`divisor` is `std + advantage_eps`, or 1 with `scale_rewards="none"`. Per-token columns have an entry for each token,
null where there is nothing. Names that prime-rl's token export has too mean the same. The file's metadata holds the
run's settings as JSON under `trl_grpo_ext.credit`.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa


FORMAT = 1
METADATA_KEY = b"trl_grpo_ext.credit"

_NUMBERS = pa.list_(pa.float32())
# What a reader adds up to 1e-5, also where returns are large
_EXACT = pa.list_(pa.float64())
_INDICES = pa.list_(pa.int32())

SOURCE = pa.struct(
    {
        "name": pa.string(),
        "weight": pa.float64(),
        "gamma": pa.float64(),
        "transform": pa.string(),
        "gate": pa.string(),
        "is_steps": pa.bool_(),
        "ends": _INDICES,
        "returned": _EXACT,
        "transformed": _EXACT,
        "withheld": pa.bool_(),
        "reward": _EXACT,
        "shaped": _EXACT,
        "return": _EXACT,
        "mean": _EXACT,
        "std": _EXACT,
        "divisor": _EXACT,
        "share": _EXACT,
    }
)
# What the loss has seen of each token
OBSERVED = ("trainer_logprobs", "old_logprobs", "ref_logprobs", "inference_logprobs", "entropy", "kl")
COLUMNS = {
    "step": pa.int64(),
    "mode": pa.string(),
    "prompt": pa.string(),
    "group": pa.int32(),
    "completion": pa.int32(),
    "token_ids": _INDICES,
    "tokens": pa.list_(pa.string()),
    "loss_mask": pa.list_(pa.bool_()),
    "advantages": _NUMBERS,
    **dict.fromkeys(OBSERVED, _NUMBERS),
    "truncated": pa.bool_(),
    "explained": pa.bool_(),
    "offset": pa.float64(),
    "batch_divisor": pa.float64(),
    "step_ends": _INDICES,
    "sources": pa.list_(SOURCE),
}


def schema(settings: Mapping[str, Any]) -> pa.Schema:
    """The columns, with the run's settings in the metadata."""
    described = {"format": FORMAT, **settings}
    return pa.schema(COLUMNS, metadata={METADATA_KEY: json.dumps(described).encode()})
