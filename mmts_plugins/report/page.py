"""One self-contained HTML page: text, tables and pictures inside it, nothing fetched, everything escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from .._files import replacing


class Page:
    """A page that is written from top to bottom. All text given to it is plain text; it is escaped here.

    Args:
        title: of the page, its first heading too.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def subheading(self, text: str) -> None:
        """Start a part of a section."""
        self._body.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str, small: bool = False) -> None:
        """A paragraph."""
        self._body.append(f"<p{' class=small' if small else ''}>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self._body.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> None:
        """A table: the first column holds names, the others numbers (or, with ``words``, text)."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        self._body.append(
            f'<div class="wide"><table{" class=words" if words else ""}>\n'
            + (f"<thead><tr>{head}</tr></thead>\n" if header else "")
            + f"<tbody>\n{body}</tbody>\n</table></div>"
        )

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._body.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>\n" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Commands or other text with its line breaks."""
        self._body.append(f"<pre>{html.escape(text)}</pre>")

    def picture(self, path: Path, alt: str) -> None:
        """A PNG, put inside the page.

        Args:
            path: of the file, read now.
            alt: what it shows, for those who do not see it.
        """
        self._body.append(embedded(path, alt))

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(shell(self.title, "\n".join(self._body)), encoding="utf-8")


def number(value: float) -> str:
    """A count or a mean of counts, to four digits: 14,848 or 93.28."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def embedded(image: Path, alt: str) -> str:
    """An ``img`` element that holds the PNG itself."""
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def shell(title: str, body: str) -> str:
    """A whole document around ``body``, which is HTML; the title is plain text."""
    return _SHELL.substitute(title=html.escape(title), body=body)


_SHELL = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 46rem; margin: 0 auto;
       padding: 1.5rem 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
.note { border-left: 4px solid #e09f3e; background: #fdf6ea; padding: .6rem .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .25rem .35rem .5rem; border-bottom: 1px solid #e2e2e2; text-align: right;
         vertical-align: top; }
th { border-bottom: 2px solid #1c1c1c; }
td:not(:first-child) { white-space: nowrap; }
.words td, .words th { white-space: normal; min-width: 5.5rem; overflow-wrap: anywhere; }
.words td:first-child { overflow-wrap: break-word; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
img { width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
.small { font-size: .9rem; color: #555; }
@media (max-width: 34rem) { table { font-size: .85rem; } }
</style>
</head>
<body>
$body
</body>
</html>
""")
