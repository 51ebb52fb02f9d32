"""Models that cannot be trained, or not with a KL to this reference, found at construction and named."""

from typing import Any

from peft.utils import TrainableTokensWrapper
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def check_model(model: PreTrainedModel, *, is_exact: bool) -> None:
    """
    Raise `ValueError` if TRL cannot compute the model's log-probs, or not those of a causal language model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal language model under PEFT.
        is_exact (`bool`):
            Whether the exact KL is asked for. An encoder-decoder with a backbone is refused with the exact KL, and
            left to TRL with a warning otherwise.
    """
    name = type(model).__name__
    has_backbone = model.base_model is not model
    if model.config.is_encoder_decoder:
        message = (
            f"{name} is an encoder-decoder. TRL would give prompt and completion to its encoder, which would see the "
            "tokens that are to be predicted. Use a decoder-only model."
        )
        if is_exact or not has_backbone:
            raise ValueError(message)
        logger.warning(message)
    elif not has_backbone:
        raise ValueError(
            f"TRL finds no backbone in {name} (its base_model is the model itself), so that there are no hidden "
            "states to compute log-probs from, with any kl_estimator. Use a model of another family."
        )
    if isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise ValueError(
            "trainable_token_indices on tied embeddings changes the LM head too, whose weight TRL cannot read. Untie "
            "them (tie_word_embeddings=False in the model's config), or train both whole with "
            "modules_to_save=['embed_tokens', 'lm_head'] instead."
        )


def check_router_loss(config: Any, *, is_weighted: bool) -> None:
    """
    Raise `ValueError` if TRL fails to make a mixture of experts' load-balancing loss, which the exact KL leaves to the
    model.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Of the causal language model.
        is_weighted (`bool`):
            Whether TRL adds it to the loss. It is also made where the config says `output_router_logits`.
    """
    text_config = config.get_text_config()
    fields = text_config.to_dict()
    is_made = is_weighted or fields.get("output_router_logits", False)
    if is_made and "num_experts" not in {*fields, *text_config.attribute_map}:
        raise ValueError(
            f"TRL reads num_experts for the load-balancing loss, which the config of {text_config.model_type} has "
            "under another name. Use kl_estimator='exact', which leaves that loss to the model; or "
            "router_aux_loss_coef=0, and output_router_logits=False in the model's config."
        )


def check_head_cast(model: Any, args: Any, *, has_adapter: bool) -> None:
    """
    Raise `ValueError` where TRL cannot cast the LM head, before it tries.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as the trainer was given it.
        args ([`~trl_grpo_ext.GRPOExtConfig`]):
            The settings.
        has_adapter (`bool`):
            Whether the model has an adapter, or gets one.
    """
    if not (args.cast_lm_head_to_fp32 and has_adapter):
        return
    if isinstance(model, str):
        init_kwargs = args.model_init_kwargs or {}
        trust = init_kwargs.get("trust_remote_code", args.trust_remote_code)
        config = AutoConfig.from_pretrained(model, revision=init_kwargs.get("revision"), trust_remote_code=trust)
    else:
        config = model.config
    if config.tie_word_embeddings:
        raise ValueError(
            "cast_lm_head_to_fp32=True with an adapter on a model of tied embeddings fails in TRL, which looks for "
            "the embeddings under the adapter. Use cast_lm_head_to_fp32=False, or untie the embeddings "
            "(tie_word_embeddings=False in the model's config)."
        )


def check_vocabularies(config: Any, ref_config: Any, num_tokens: int | None = None) -> None:
    """
    Raise `ValueError` if the reference does not know the tokens that it will be asked for.

    Args:
        config, ref_config ([`~transformers.PreTrainedConfig`]):
            Of the two causal language models.
        num_tokens (`int`, *optional*):
            How many tokens the tokenizer has, for a KL that is estimated from sampled tokens. The exact KL needs one
            vocabulary.
    """
    size = config.get_text_config().vocab_size
    ref_size = ref_config.get_text_config().vocab_size
    if size == ref_size or (num_tokens is not None and min(size, num_tokens) <= ref_size):
        return
    raise ValueError(
        f"The policy's vocabulary has {size} tokens, and that of the reference, which is loaded from "
        f"'{ref_config.name_or_path}', {ref_size}. Resize the embeddings first, save the model and its tokenizer, and "
        "pass the folder, so that both start from there."
    )
