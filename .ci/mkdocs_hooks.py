"""For the site: what documents and docstrings say in the ways of GitHub and of Sphinx."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|meth|class|attr|data|mod):<code>~?([^<]*)</code>")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A link to a file outside ``docs/`` becomes its text, for the site does not hold the file. It must be there."""
    folder = Path(page.file.abs_src_path).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]} does not exist")
        inside = target.is_relative_to(Path(config.docs_dir).resolve())
        return link[0] if inside else link[1]

    return _LINK.sub(plain, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`name` `` as the code that it is."""
    return _ROLE.sub(r"<code>\1</code>", html)
