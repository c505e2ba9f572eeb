"""English text that every Python has: the language's own documentation, in `pydoc_data.topics`."""

from __future__ import annotations

import pydoc_data.topics
import re

__all__ = ["sample_text"]


def sample_text() -> str:
    """A third of a megabyte of English paragraphs; the same in every run of one Python version."""
    topics = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    topics = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", topics)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", topics))
    # Grammar, code and headings are not sentences.
    return "\n\n".join(p for p in paragraphs if len(p) > 80 and p.endswith((".", ":")) and "::=" not in p)
