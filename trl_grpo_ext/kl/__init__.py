"""
The KL of policy and reference.

- `estimates`: from the sampled token.
- `divergences`: exact, over the whole vocabulary; one table, dense.
- `fused`: the same from hidden states, without a tensor of all logits.
- `model_forward`, `reference`, `cached_reference`: how the exact KL gets at both models' hidden states.
- `supported`, `start`, `own_logits`: what would train on another KL than the one that was asked for is said before.
- `trainer`: the KL in TRL's loss.

What the reference is:

| model | `sync_ref_model` | reference |
|---|---|---|
| any, with `beta=0` | | none |
| without PEFT | no | TRL's `ref_model`, loaded anew from the model's path |
| without PEFT | yes | the same, moved by TRL's callback |
| with a fresh adapter, made from `peft_config` | no | the model without its adapter |
| with a fresh adapter | yes | the frozen adapter `"ref"`, moved by `OnSync` |
| that came with an adapter | either | the frozen adapter `"ref"`, a copy of the one that came |

With the exact KL, `CachedReference` runs any of them once for each generated batch.
"""
