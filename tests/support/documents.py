"""The README and its pages, as tests read them."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}


def blocks(language: str) -> list[str]:
    """Every fenced block of a language."""
    return [block for text in TEXTS.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def python_example(text: str) -> str:
    """The one example in Python that has this text."""
    (block,) = [block for block in blocks("python") if text in block]
    return block


def commands() -> list[str]:
    """Every command line, of fenced blocks and in running text, without comments and continuation lines."""
    found = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for text in TEXTS.values():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += re.findall(r"`((?:python|accelerate|pip|trl-grpo-ext) [^`\n]+)`", prose)
    parts = [part for line in found for part in re.sub(r"\s#\s.*", "", line).split(" && ")]
    return [re.sub(r"\s+", " ", part).strip() for part in parts if part.strip()]
