"""What every page of ours must be: one file that fetches nothing and describes its pictures."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Optional


class Fetches(HTMLParser):
    """Everything in a page that a browser would fetch, and every picture without a description."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.fetched += [given[name] for name in ("src", "href", "srcset", "data") if name in given]
        if tag in ("link", "script", "iframe", "object"):
            self.fetched.append(tag)
        if tag == "img":
            self.pictures.append(given.get("alt", ""))


def assert_self_contained(page: str, pictures: int) -> None:
    parser = Fetches()
    parser.feed(page)
    assert all(address.startswith("data:image/png;base64,") for address in parser.fetched)
    assert len(parser.fetched) == len(parser.pictures) == pictures
    assert all(len(alt) > 20 for alt in parser.pictures)
    assert "url(" not in page
    assert "@import" not in page
