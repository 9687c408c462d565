"""Published forms of caption files, each described once: by what it is known, and where its captions are.

A *path* says where something stands in a JSON document: ``name`` a field, ``[]`` every item of a list, ``{}`` every
value of an object, ``[from=gpt|assistant]`` the items whose field is one of these; ``.`` is the thing itself. So
``annotations[].caption`` are COCO's captions. Of a field that holds a list of texts every text is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Optional, Union

from ..errors import ConfigError, listed, shown

Step = tuple[str, str]  # a kind of step (field, items, values, where), and what it names

_STEP = re.compile(r"\[\]|\{\}|\[(?P<field>[^\[\]=]+)=(?P<among>[^\[\]]*)\]|\.?(?P<name>[^\[\]{}.]+)|\.(?=$)")
_LOOKED_AT = 20  # records that tell a form
_TEXT_FIELDS = ("caption", "captions", "sentence", "sentences", "raw", "desc", "description", "text", "comment")
_DEEPEST = 6


class Found(NamedTuple):
    """A caption, and the image or video that it is of, as far as the file names it."""

    caption: Any
    image: Optional[str] = None


@dataclass(frozen=True)
class Form:
    """A JSON document of a published data set.

    Attributes:
        name: as ``--format`` takes it.
        title: whose it is.
        records: path of the records.
        needs: fields of a record by which the form is known.
        captions: path inside a record.
        image: path inside a record, of the name of its image or video; ``{}`` for its key.
        split: path inside a record, and ``train`` the values of it that are trained on.
        joined: fields ``(list, its key, what is wanted, the record's key)`` of another list of the document: an image's
            name, or a split.
    """

    name: str
    title: str
    records: str
    needs: tuple[str, ...]
    captions: str
    image: str = ""
    split: str = ""
    train: tuple[str, ...] = ()
    joined: tuple[str, str, str, str] = ("", "", "", "")


FORMS = (
    Form("coco", "COCO captions", "annotations[]", ("caption", "image_id"), "caption", image="+",
         joined=("images", "id", "file_name", "image_id")),
    Form("karpathy", "Karpathy's splits of COCO and Flickr", "images[]", ("sentences", "split"), "sentences[].raw",
         image="filename", split="split", train=("train", "restval")),
    Form("msrvtt", "MSR-VTT", "sentences[]", ("caption", "video_id"), "caption", image="video_id", split="+",
         train=("train",), joined=("videos", "video_id", "split", "video_id")),
    Form("youcook2", "YouCook2", "database{}", ("annotations",), "annotations[].sentence", image="{}", split="subset",
         train=("training",)),
    Form("llava", "LLaVA conversations", "[]", ("conversations",), "conversations[from=gpt|assistant].value",
         image="image"),
    Form("vatex", "VATEX", "[]", ("enCap",), "enCap", image="videoID"),
    Form("ssv2", "Something-Something V2", "[]", ("label", "template"), "label", image="id"),
    Form("didemo", "DiDeMo", "[]", ("description", "video"), "description", image="video"),
    Form("xm3600", "Crossmodal-3600", "[]", ("image/key",), "en.caption", image="image/key"),
    Form("activitynet", "ActivityNet Captions", "{}", ("sentences", "timestamps"), "sentences", image="{}"),
    Form("howto100m", "HowTo100M", "{}", ("text", "start"), "text", image="{}"),
    Form("captions", "{id: caption} and {id: [captions]}", "{}", (), ".", image="{}"),
    Form("list", "a list of captions", "[]", (), "."),
)  # fmt: skip
"""In the order in which they are tried."""
RECORDS = "json"
"""``--format`` of a list of objects, or of one object per line, that have a column of captions."""


class Lines(NamedTuple):
    """A text file whose lines hold more than a caption.

    Attributes:
        name: as ``--format`` takes it.
        title: whose it is.
        line: of a line, with a group ``caption`` and, where there is one, ``image``.
        header: of a first line that is no caption; otherwise the first must be as the others.
        says: what the lines look like, for messages.
    """

    name: str
    title: str
    line: re.Pattern[str]
    says: str
    header: Optional[re.Pattern[str]] = None


_NAME = r"[^\t|#]+\.(?:jpe?g|png|webp|gif|bmp|mp4|avi|mkv|mov|webm)"
LINES = (
    Lines("flickr8k", "Flickr8k.token.txt, results_20130124.token",
          re.compile(rf"(?P<image>{_NAME})#\d+\t(?P<caption>.*)", re.I), "NAME#N<tab>text"),
    Lines("flickr30k", "Flickr30k's results.csv",
          re.compile(rf"(?P<image>{_NAME})\|\s*\d+\s*\|\s*(?P<caption>.*)", re.I), "NAME| N| text",
          re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment", re.I)),
    Lines("charades-sta", "Charades-STA", re.compile(r"(?P<image>\w+) [\d.]+ [\d.]+##(?P<caption>.*)"),
          "VIDEO START END##text"),
    Lines("cc3m", "CC3M without a header", re.compile(r"(?P<caption>[^\t]+)\t(?P<image>https?://[^\t]+)"),
          "text<tab>URL"),
    Lines("cc12m", "CC12M without a header", re.compile(r"(?P<image>https?://[^\t]+)\t(?P<caption>[^\t]+)"),
          "URL<tab>text"),
)  # fmt: skip
KAGGLE = re.compile(r"image(?:_name)?,caption\s*", re.I)
"""The first line of Kaggle's ``captions.txt``: a CSV with commas."""
LINE_SHARE = 0.9
"""Of a file's lines that must be of a form."""

NAMES = (*(form.name for form in (*FORMS, *LINES)), "kaggle")


def form_named(name: str) -> Optional[Form]:
    return next((form for form in FORMS if form.name == name), None)


def lines_named(name: str) -> Optional[Lines]:
    return next((form for form in LINES if form.name == name), None)


FORMATS = ("auto", "csv", "text", RECORDS, "parquet", "arrow", "webdataset", "pairs", *NAMES)
"""What ``--format`` takes."""


# -- paths -------------------------------------------------------------------------------------------------------------


def steps(path: str) -> list[Step]:
    """A path in its steps.

    Raises:
        ConfigError: it is none.
    """
    found: list[Step] = []
    place = 0
    if path in ("", "."):
        return found
    while place < len(path):
        match = _STEP.match(path, place)
        if match is None or match.end() == place:
            raise ConfigError(
                f"--column {shown(path)}: not a path: fields joined by dots, [] for every item of a list and {{}} for "
                "every value of an object, such as annotations[].caption"
            )
        if match["name"]:
            found.append(("field", match["name"]))
        elif match["field"]:
            found.append(("where", f"{match['field']}={match['among']}"))
        elif match[0] in ("[]", "{}"):
            found.append(("items" if match[0] == "[]" else "values", ""))
        place = match.end()
    return found


def walk(value: Any, path: Sequence[Step]) -> Iterator[Any]:
    """Everything that stands at a path; nothing where the document has no such place."""
    if not path:
        yield value
        return
    (kind, name), rest = path[0], path[1:]
    if kind == "field":
        inside: Union[list[Any], Any] = [value[name]] if isinstance(value, dict) and name in value else []
    elif kind == "values":
        inside = value.values() if isinstance(value, dict) else []
    else:
        inside = value if isinstance(value, list) else []
        if kind == "where":
            field, _, among = name.partition("=")
            inside = [each for each in inside if isinstance(each, dict) and each.get(field) in among.split("|")]
    for each in inside:
        yield from walk(each, rest)


def texts(value: Any) -> Iterator[Any]:
    """A text, or the items of a list of them; whatever else is there as it is."""
    if isinstance(value, list):
        yield from value
    else:
        yield value


def is_path(column: str) -> bool:
    """Whether ``--column`` names a place inside of something, not only a field."""
    return bool(re.search(r"\[|\{\}|\.", column))


# -- telling a form ----------------------------------------------------------------------------------------------------


def recognise(document: Any) -> Optional[Form]:
    """The form of a JSON document; ``None`` where it is of none, or records with a column."""
    for form in FORMS:
        if _fits(form, document):
            return form
    return None


def _fits(form: Form, document: Any) -> bool:
    *outside, (last, _) = steps(form.records)
    for container in walk(document, outside):
        if not isinstance(container, list if last == "items" else dict) or not container:
            return False
        return fits(form, container.values() if isinstance(container, dict) else container)
    return False


def fits(form: Form, records: Iterable[Any]) -> bool:
    """Whether the first of some records, if there are any, are a form's."""
    some = list(islice(records, _LOOKED_AT))
    if form.needs:
        return bool(some) and all(isinstance(each, dict) and {*form.needs} <= {*each} for each in some)
    return bool(some) and all(isinstance(text, str) for each in some for text in texts(each))


def record_form(record: Any) -> Optional[Form]:
    """The form of which a record in a list, or on a line of its own, is."""
    return recognise([record])


# -- reading -----------------------------------------------------------------------------------------------------------


def records(form: Form, document: Any) -> Iterator[tuple[str, Any]]:
    """The records of a document, each with its key, or its number."""
    *outside, (last, _) = steps(form.records)
    for container in walk(document, outside):
        if last == "values" and isinstance(container, dict):
            yield from ((str(key), value) for key, value in container.items())
        elif isinstance(container, list):
            yield from ((str(number), value) for number, value in enumerate(container, 1))


@dataclass(frozen=True)
class Reader:
    """A form, for one file: what its records are joined with, and which splits are wanted.

    Attributes:
        captions, image, split: paths in steps.
        other: from a record's key to what it is joined with.
        wanted: values of the split; empty for all.
    """

    form: Form
    captions: Sequence[Step]
    other: dict[Any, Any]
    wanted: tuple[str, ...]

    @classmethod
    def of(cls, form: Form, document: Any, column: Optional[str], split: Optional[str]) -> Reader:
        """For a document, or a list of some of its records.

        Args:
            column: path of the captions in a record, instead of the form's.
            split: names with commas, ``all``, or ``None``: what is trained on.
        """
        where, key, what, _ = form.joined
        others = walk(document, [*steps(where), ("items", "")]) if where else ()
        other = {each.get(key): each.get(what) for each in others if isinstance(each, dict)}
        wanted: tuple[str, ...] = ()
        if form.split and split != "all":
            wanted = form.train if split is None else tuple(split.split(","))
        return cls(form, steps(form.captions if column is None else column), other, wanted)

    def split_of(self, record: Any) -> Optional[str]:
        """The record's split, where the form has one."""
        return self._one(self.form.split, "", record)

    def take(self, key: str, record: Any) -> Iterator[Found]:
        """The captions of a record; what is no text comes as it is."""
        image = self._one(self.form.image, key, record)
        for place in walk(record, self.captions):
            for text in texts(place):
                yield Found(text, image)

    def _one(self, path: str, key: str, record: Any) -> Optional[str]:
        if not path:
            return None
        if path == "{}":
            return key
        if path == "+":
            found = self.other.get(record.get(self.form.joined[3])) if isinstance(record, dict) else None
        else:
            found = next(walk(record, steps(path)), None)
        return None if found is None else str(found)


# -- what to say of a document of no form ------------------------------------------------------------------------------


def structure(value: Any, depth: int = 0) -> str:
    """A document in a few words, such as ``an object of 'data' (a list of objects of 'id', 'txt')``."""
    if isinstance(value, list):
        return f"a list of {structure(value[0], depth + 1)}" if value else "an empty list"
    if isinstance(value, dict):
        if not value or depth == _DEEPEST:
            return "an object"
        name, first = next(iter(value.items()))
        inside = f", {shown(name)} being {structure(first, depth + 1)}" if isinstance(first, (dict, list)) else ""
        return f"an object of {listed(list(value))}{inside}"
    return "texts" if isinstance(value, str) and depth else json.dumps(value)[:40]


def caption_path(value: Any, path: str = "", named: bool = False, depth: int = 0) -> Optional[str]:
    """Where captions may stand in a document: below a field of a usual name, and many of them."""
    if isinstance(value, str):
        return path if named and ("[]" in path or "{}" in path) else None
    if not value or not isinstance(value, (dict, list)) or depth == _DEEPEST:
        return None
    if isinstance(value, list):
        return caption_path(value[0], f"{path}[]", named, depth + 1)
    for name in _TEXT_FIELDS:
        if name in value and (found := caption_path(value[name], _below(path, name), True, depth + 1)):
            return found
    one = next(iter(value.values()))
    alike = len(value) > 1 and isinstance(one, dict)
    if alike and all(isinstance(each, dict) and each.keys() & one.keys() for each in value.values()):
        return caption_path(one, f"{path}{{}}", named, depth + 1)  # records by their ids
    for name, each in value.items():
        if found := caption_path(each, _below(path, str(name)), named, depth + 1):
            return found
    return None


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
