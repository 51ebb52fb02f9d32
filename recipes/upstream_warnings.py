"""Warnings of libraries about each other, which no setting of a recipe removes."""

import warnings


# Each with who is warned, as of TRL 1.16, transformers 5.24, peft 0.21 and DeepSpeed 0.19
UPSTREAM_WARNINGS = (
    # TRL and peft read this attribute of every model, under the name that transformers is about to retire
    "`is_gradient_checkpointing` is deprecated",
    # DeepSpeed calls them, under the names that torch is about to retire
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)


def ignore_upstream_warnings() -> None:
    """Leave these warnings out, and no other."""
    for message in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
