"""The KL's reference in a checkpoint, where it has moved and cannot be had from elsewhere."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..distributed import assign_whole, whole


# In a folder of its own: servers load every safetensors file that lies beside the model's
REFERENCE_NAME = "reference/parameters.safetensors"


def save_reference(folder: Path, parameters: dict[str, torch.Tensor], write: bool) -> None:
    """
    Save the reference's parameters in a checkpoint; all processes take part.

    Args:
        folder (`Path`):
            The checkpoint's folder.
        parameters (`dict[str, torch.Tensor]`):
            By name, sharded or not.
        write (`bool`):
            Whether this process writes the file.
    """
    values = {}
    for name, parameter in parameters.items():
        # Every process has to take part in gathering a sharded parameter
        value = whole(parameter)
        if write:
            values[name] = value
    if values:
        path = folder / REFERENCE_NAME
        path.parent.mkdir(exist_ok=True)
        save_file(values, path)


def load_reference(folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """
    Give the reference's parameters, sharded or not, the values of a checkpoint.

    Raises:
        ValueError: the checkpoint holds the reference of another model; with the names that differ.
    """
    path = folder / REFERENCE_NAME
    with safe_open(path, framework="pt") as file:
        if differing := sorted(set(file.keys()) ^ parameters.keys()):
            raise ValueError(f"{path} is the reference of another model: {', '.join(differing[:5])} differ(s).")
        for name, parameter in parameters.items():
            assign_whole(parameter, file.get_tensor(name))
