"""The README for the page of a package index, where links must be whole: hatchling asks for it, by pyproject.toml.

The repository's address is that of `Repository` in pyproject.toml's urls, and is written nowhere else.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class LongDescription(MetadataHookInterface):
    """What hatchling calls."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the text into the metadata."""
        text = whole(Path(self.root, "README.md").read_text(encoding="utf-8"), metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def whole(text: str, repository: str) -> str:
    """The text with an address for each link and picture that names a file of the checkout."""

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", link, text)
