"""Hooks of MkDocs: links to files outside of docs/ lead to the repository."""

import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# OWNER until the repository has an address; then `repo_url` of mkdocs.yml says it
REPOSITORY = "https://github.com/OWNER/jax_ordermerge/blob/main"
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **unused: object) -> str:
    """Return the page with links such as ../configs/quickstart.yaml as addresses.

    MkDocs knows pages alone. A file that does not exist stays as it is, and MkDocs reports it.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    address = (config.repo_url or REPOSITORY).rstrip("/")

    def outside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return match[0]
        return f"]({address}/{target}{match[2] or ''})"

    return _LINK.sub(outside, markdown)
