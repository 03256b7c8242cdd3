"""What `make docs` adds: the README as the start page; links that lead out of the site become plain text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
"""Page of the site: file of the repository."""
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that do not lie in docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, file in PAGES.items():
            text = text.replace(f"]({file})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turns links to files of the repository that are no pages into their text and path."""
    folder = posixpath.dirname(page.file.src_uri)

    def plain(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        place = posixpath.normpath(posixpath.join(folder, target))
        if target.startswith(("http://", "https://", "mailto:")) or files.get_file_from_path(place) is not None:
            return found[0]
        # pages of docs/ are relative to it, those of PAGES to the repository
        file = next((path for path in (ROOT / "docs" / place, ROOT / place) if path.exists()), None)
        return found[0] if file is None else f"{text} (`{file.resolve().relative_to(ROOT).as_posix()}`)"

    return LINK.sub(plain, markdown)
