"""One self-contained HTML page: text, tables and pictures inside it, nothing fetched, everything escaped."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from .._files import replacing

_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SLUG = 48  # characters; of four bytes each they fit a file's name, with what stands around them


class Page:
    """A page that is written from top to bottom. All text given to it is plain text; it is escaped here.

    Args:
        title: of the page, its first heading too.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body = [f"<h1>{escaped(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{escaped(text)}</h2>")

    def subheading(self, text: str) -> None:
        """Start a part of a section."""
        self._body.append(f"<h3>{escaped(text)}</h3>")

    def text(self, text: str, small: bool = False) -> None:
        """A paragraph."""
        self._body.append(f"<p{' class=small' if small else ''}>{escaped(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self._body.append(f'<p class="note">{escaped(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> None:
        """A table: the first column holds names, the others numbers (or, with ``words``, text)."""
        head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        self._body.append(
            f'<div class="wide"><table{" class=words" if words else ""}>\n'
            + (f"<thead><tr>{head}</tr></thead>\n" if header else "")
            + f"<tbody>\n{body}</tbody>\n</table></div>"
        )

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._body.append("<ul>" + "".join(f"<li>{escaped(text)}</li>\n" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Commands or other text with its line breaks."""
        self._body.append(f"<pre>{escaped(text)}</pre>")

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


def escaped(text: str) -> str:
    """Plain text as HTML, whatever it holds: half a character and what no page may hold are shown as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(_FORBIDDEN.sub(lambda found: ascii(found[0])[1:-1], text))


def number(value: float) -> str:
    """A count or a mean of counts, to four digits: 14,848 or 93.28."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def slugs(names: Sequence[str]) -> list[str]:
    """Names as parts of file names: short, and all different, also where letters' case makes no difference."""
    taken: set[str] = set()
    made = []
    for name in names:
        short = re.sub(r"[^\w.-]+", "_", name)[:_SLUG]
        candidates = itertools.chain([short], (f"{short}_{more}" for more in itertools.count(2)))
        each = next(each for each in candidates if each.casefold() not in taken)
        taken.add(each.casefold())
        made.append(each)
    return made


def embedded(image: Path, alt: str) -> str:
    """An ``img`` element that holds the PNG itself."""
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escaped(alt)}">'


def shell(title: str, body: str) -> str:
    """A whole document around ``body``, which is HTML; the title is plain text."""
    return _SHELL.substitute(title=escaped(title), body=body)


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
