"""The load-balancing loss of every mixture of experts in transformers is the one that the model itself makes."""

import weakref

import pytest
import torch
import transformers
from trl.trainer.utils import add_fused_lm_head

from tests.support.families import SIZES, VOCABULARY, families_with_router_loss, tiny
from trl_grpo_ext._trl import head_settings, let_copies_compute
from trl_grpo_ext.kl.fused.predicted_gradient import SecondPassCount
from trl_grpo_ext.kl.model_forward import ExactKLHead, active_lm_head, add_exact_kl


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_heads", "num_attention_heads")}
VISION |= {"depth": 1, "num_hidden_layers": 1, "patch_size": 4, "image_size": 8, "out_hidden_size": 32}
TEXT = {
    name: SIZES[name]
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "pad_token_id"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("num_experts", "num_experts_per_tok", "bos_token_id", "eos_token_id"),
    )
}
LATENT = {**dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"], 8), "qk_rope_head_dim": 0}
AUDIO = {**dict.fromkeys(["d_model", "encoder_ffn_dim", "output_dim"], 32), "encoder_layers": 1, "num_mel_bins": 16}

# Where the default config with small sizes makes no model, or one without experts
SETTINGS = {
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "DeepseekV4ForCausalLM": {"mlp_layer_types": ["moe", "moe"]},
    "DogeForCausalLM": {"is_moe": True, "num_experts": 16},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            **TEXT,
            **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], "rope_parameters": ROPE},
            "mlp_layer_types": ["sparse", "sparse"],
        }
    },
    "FlintForCausalLM": {"mlp_only_layers": []},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {
            **TEXT,
            **{"n_routed_experts": 4, "first_k_dense_replace": 0},
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
        }
    },
    "Glm5NextForConditionalGeneration": {
        "text_config": {
            **TEXT,
            **LATENT,
            **{"num_key_value_heads": 4, "n_routed_experts": 4, "mlp_layer_types": ["sparse", "sparse"]},
            **{"linear_num_heads": 4, "linear_head_dim": 8},
        }
    },
    "MiniMaxM3SparseForConditionalGeneration": {"text_config": {**TEXT, "num_local_experts": 4}},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "text_config": TEXT,
        "audio_config": {**AUDIO, "encoder_attention_heads": 4, "downsample_hidden_size": 8},
        # Which its forward reads, and its config lacks
        "vision_start_token_id": 40,
    },
    "Qwen3VLMoeForConditionalGeneration": {"text_config": {**TEXT, "rope_parameters": ROPE}},
}


def settings(family):
    found = SETTINGS.get(family, {})
    if "ConditionalGeneration" in family:
        found = {"text_config": TEXT, **found, "vision_config": VISION}
    return found


def router_gradients(model, aux_loss):
    model.zero_grad()
    aux_loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", families_with_router_loss())
def test_the_exact_kl_keeps_the_models_own_router_loss(family):
    model = tiny(getattr(transformers, family), **settings(family))
    ids = torch.randint(7, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True}
    own = model(**inputs, use_cache=False)
    own_logps = own.logits.log_softmax(-1)[:, -7:-1].gather(-1, ids[:, -6:, None])[..., 0]
    own_gradients = router_gradients(model, own.aux_loss)

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    reference_head = weakref.ref(active_lm_head(model))
    # A few tokens at a time
    kl_head = ExactKLHead(head_settings(model.forward), 100 * VOCABULARY, "reverse", SecondPassCount(), reference_head)
    let_copies_compute(model)
    add_exact_kl(model)
    labels = torch.cat([torch.full((2, 6), -100), ids[:, -6:]], dim=1)
    call = {**inputs, "labels": labels, "fused_lm_head": True}
    with torch.no_grad():
        ref_hidden_states = model(**call, return_hidden_states=True).log_probs[:, -6:]
    output = model(**call, ref_hidden_states=ref_hidden_states, kl_head=kl_head)
    assert own.aux_loss > 0.5 and own_gradients
    torch.testing.assert_close(output.aux_loss, own.aux_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.log_probs, own_logps, rtol=1e-5, atol=1e-5)
    assert output.kl.abs().max() < 1e-6
    found = router_gradients(model, output.aux_loss)
    assert found.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
