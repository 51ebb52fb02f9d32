"""The answers of a judge on disk, by the content of the question."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


def content_key(question: Mapping[str, Any]) -> str:
    """A name for all that is asked: equal questions have equal names."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """
    Answers in a folder, one file each, which processes may share.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            The folder; without one nothing is stored.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"cache is {str(folder)!r}, which is a file; give a folder.")

    def get(self, key: str) -> str | None:
        """The stored answer, `None` if there is none that is whole."""
        if self._folder is None:
            return None
        try:
            answer = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return answer if isinstance(answer, str) else None

    def put(self, key: str, answer: str) -> None:
        """Store an answer. A full disk is a warning: the answer is paid for, and the training can go on with it."""
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Killed while it writes, a run must not leave half an answer
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as unfinished:
                json.dump({"answer": answer}, unfinished)
            os.replace(unfinished.name, path)
        except OSError as error:
            logger.warning("An answer of the judge is not stored: %s", error)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        # Folders with very many files are slow on some file systems
        return folder / key[:2] / f"{key}.json"
