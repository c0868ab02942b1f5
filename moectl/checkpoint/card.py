"""What the model card of a derived checkpoint takes over from that of its source."""

from __future__ import annotations

import re

from moectl.checkpoint.source import Checkpoint

_LICENCE_LINES = re.compile(r"^(license|license_name|license_link|language):[ \t]*\S.*$", re.MULTILINE)


def inherited(source: Checkpoint) -> list[str]:
    """Licence and language lines of the source's own card."""
    path = source.path / "README.md"
    try:
        text = path.read_text(encoding="utf-8")[:100_000]
    except (OSError, UnicodeDecodeError):
        return []
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return []
    return [match.group(0) for match in _LICENCE_LINES.finditer(text[4 : text.index("\n---", 4) + 1])]
