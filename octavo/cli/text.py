"""Text for the verbs that need some: a file's, or Python's documentation (`pydoc_data.topics`), which is always there.

A .jsonl file has one JSON object per line, with a "text", or with "messages" for the model's chat template.
"""

from __future__ import annotations

import json
import platform
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

from octavo.cli.verb import CommandError

__all__ = ["read_documents", "read_text", "sample_text"]


def sample_text() -> str:
    """A third of a megabyte of English paragraphs, the same in every run of one Python version."""
    topics = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    topics = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", topics)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", topics))
    # Leave out grammar, code and headings: they are not sentences.
    return "\n\n".join(p for p in paragraphs if len(p) > 80 and p.endswith((".", ":")) and "::=" not in p)


def read_text(option: str, file: str | None) -> tuple[str, str]:
    """The text of a file (None: the sample text), and a name for it.

    option: the option that named the file, for errors.
    Raises: CommandError if it cannot be read, or is not UTF-8.
    """
    if file is None:
        return sample_text(), f"Python {platform.python_version()}'s documentation (pydoc_data.topics)"
    try:
        # The byte order mark (BOM) that some editors put first is not part of the text.
        return Path(file).read_text(encoding="utf-8-sig"), file
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{option} {file}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except IsADirectoryError as error:
        raise CommandError(f"{option} {file}: is a folder, expected a file; give one that is in it") from error
    except OSError as error:
        raise CommandError(f"{option} {file}: {error.strerror}; expected a file of text") from error


def read_documents(option: str, file: str) -> list[Any]:
    """The documents of a .jsonl file: a str for each "text", a list of dicts for each "messages".

    Blank lines are skipped.
    option: the option that named the file, for errors.
    Raises: CommandError naming the line for anything else.
    """
    documents = []
    for number, line in enumerate(read_text(option, file)[0].split("\n"), 1):
        if line.strip():
            documents.append(_document(line, f"{option} {file}, line {number}"))
    if not documents:
        raise CommandError(f"{option} {file}: is empty, expected one JSON object a line")
    return documents


def _document(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CommandError(f"{where}: is not JSON: {error}") from error
    if isinstance(value, dict):
        if isinstance(value.get("text"), str) and value["text"].strip():
            return value["text"]
        if isinstance(value.get("messages"), list) and value["messages"]:
            return _messages(value["messages"], where)
    raise CommandError(f'{where}: expected an object with a "text" that is not blank, or with "messages"')


def _messages(messages: list[Any], where: str) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise CommandError(
                f"{where}: a message is {json.dumps(message)[:100]}, expected "
                '{"role": "user" or another, "content": ...}'
            )
    return messages
