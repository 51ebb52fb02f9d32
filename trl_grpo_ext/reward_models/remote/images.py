"""The images of a prompt, as OpenAI-compatible endpoints take them."""

import base64
import io
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# The types of a part of a message that is an image
IMAGE_TYPES = ("image", "image_url")
# Where such a part has its image: TRL's key, transformers' keys
_KEYS = ("image", "url", "path", "base64")


def images_of(prompt: Any) -> list[str]:
    """
    The images of a prompt in their order, as URLs.

    Args:
        prompt (`str` or `list[dict]`):
            A prompt as TRL gives it to reward functions.

    Raises:
        ValueError: a part of a message that is an image and holds none.
    """
    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [_url(part) for part in parts if part["type"] in IMAGE_TYPES]


def without_images(prompt: Any) -> Any:
    """The prompt without the parts of its messages that are images."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": [part for part in message["content"] if part["type"] not in IMAGE_TYPES]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _url(part: Mapping[str, Any]) -> str:
    if part["type"] == "image_url":
        given = part["image_url"]
        return given if isinstance(given, str) else given["url"]
    held = {key: part[key] for key in _KEYS if part.get(key) is not None}
    if not held:
        raise ValueError(f"a part of the prompt of type 'image' holds no image under {', '.join(_KEYS)}.")
    key, image = next(iter(held.items()))
    if key == "base64":
        return f"data:image/png;base64,{image}"
    if not isinstance(image, (str, Path)):
        # An image of PIL
        written = io.BytesIO()
        image.convert("RGB").save(written, format="PNG")
        return _data_url(written.getvalue(), "image/png")
    if str(image).startswith(("http://", "https://", "data:")):
        return str(image)
    return _data_url(Path(image).read_bytes(), mimetypes.guess_type(str(image))[0] or "image/png")


def _data_url(image: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
