"""Captions and labels of JSON: a list of objects, or one object per line."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from ..errors import MMTSError, cause, listed, shown
from .source import DEFAULT_COLUMNS, Samples, Source, join_labels, pick, require
from .text import opened_text

_MANY_FIELDS = 20  # an object of more texts is no record
_DEEPEST = 6  # levels of a document that are looked at
_TEXT_FIELDS = ("caption", "captions", "sentence", "sentences", "raw", "desc", "description", "text", "comment")


def read_json(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """VAST's annotations: a list of objects, or one object per line; a list of captions gives one sample each."""
    texts: list[str] = []
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column = None
    repeated = [0]
    for where, record in _json_records(source, repeated):
        if not isinstance(record, dict):
            hint = f" (jq -r '.[]' {shlex.quote(source.data)} > captions.txt)" if isinstance(record, str) else ""
            raise MMTSError(f"{source.data}: {where} is not an object with named fields, but {shown(record)}{hint}")
        names = list(record)
        values: list[Any] = [None]
        if captions:
            column = column or pick(source, "json", names)
            require(source, column, names, "--column", f"in {where}")
            values = record[column] if isinstance(record[column], list) else [record[column]]
            for value in values:
                if not isinstance(value, str):
                    raise MMTSError(f"{source.data}: {where}: field {shown(column)} is not text but {shown(value)}")
                _check_unicode(source, where, column, value)
            texts.extend(values)
        for label, target in zip(labels, ids):
            require(source, label, names, source.label_flag, f"in {where}")
            value = record[label]
            if isinstance(value, (list, dict, float)):
                raise MMTSError(f"{source.data}: {where}: {shown(label)} is not a class id but {shown(value)}")
            if value is not None:
                value = str(value)
                _check_unicode(source, where, label, value)
            target.extend([value] * len(values))
    notes = []
    if repeated[0]:
        notes.append(f"{source.data}: {repeated[0]} objects name a field twice; the last one counts, as in json.load")
    return Samples(texts, join_labels(source, labels, ids), column, notes)


def _check_unicode(source: Source, where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MMTSError(
            f"{source.data}: {where}: field {shown(name)} holds half a character, {text[error.start]!a} without its "
            f"other half, which no tokenizer reads: {shown(text)}; mend or drop the record"
        ) from error


def _json_records(source: Source, repeated: list[int]) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record; ``repeated[0]`` counts the objects with two fields of one name."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        repeated[0] += len(found) != len(pairs)
        return found

    with opened_text(source.data) as file:
        text = file.read()
    start = text.lstrip()[:1]
    if start == "[":
        for number, record in enumerate(json.loads(text, object_pairs_hook=object_of), 1):
            yield f"record {number}", record
        return
    for number, line in enumerate(io.StringIO(text), 1):  # splitlines() would cut at U+2028 inside a caption
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=object_of)
        except ValueError as error:
            if start == "{":
                _refuse_whole(source.data, text)
            raise MMTSError(
                f"{source.data}: line {number} is not JSON ({cause(error)}); expected a list of objects, or one object "
                "per line"
            ) from error
        if 2 * len(line) > len(text) and isinstance(record, dict) and line.strip() == text.strip():
            usual = DEFAULT_COLUMNS["json"] if source.column is None else (source.column,)
            if not any(name in record for name in usual):
                _refuse_whole(source.data, text)
        yield f"line {number}", record


def _refuse_whole(path: str, text: str) -> None:
    """Raise an MMTSError if the text is one JSON object around all captions: what it holds, and how to get them out."""
    try:
        document = json.loads(text)
    except ValueError:
        return
    containers = any(isinstance(value, (dict, list)) for value in document.values())
    if not containers and len(document) <= _MANY_FIELDS:
        return  # one record
    where = _caption_path(document) or next(
        (path for path, kind in ((".[]", str), (".[][]", list)) if all(isinstance(x, kind) for x in document.values())),
        None,
    )
    way = f"; for its captions: jq -c '{where} | {{caption: .}}' {shlex.quote(path)} > captions.jsonl" if where else ""
    first, inside = next(iter(document.items()))
    fields = f", {shown(first)} an object of {listed(list(inside))}" if isinstance(inside, dict) else ""
    raise MMTSError(
        f"{path}: is one JSON object of {listed(list(document))}{fields}; expected a list of objects, or one object "
        f"per line{way}"
    )


def _caption_path(value: Any, path: str = "", named: bool = False, depth: int = 0) -> Optional[str]:
    """Where captions stand in a document, as a path of jq: below a field of a usual name, and many of them."""
    if isinstance(value, str):
        return path if named and "[]" in path else None
    if not value or not isinstance(value, (dict, list)) or depth == _DEEPEST:
        return None
    if isinstance(value, list):
        return _caption_path(value[0], (path or ".") + "[]", named, depth + 1)
    if isinstance(value.get("split"), str) and path:
        path += ' | select(.split == "train") | '
    for name in _TEXT_FIELDS:
        if name in value and (found := _caption_path(value[name], f"{path}.{name}", True, depth + 1)):
            return found
    one = next(iter(value))
    if (
        len(value) > 1
        and isinstance(value[one], dict)
        and all(isinstance(each, dict) and each.keys() & value[one].keys() for each in value.values())
    ):
        return _caption_path(value[one], (path or ".") + "[]", named, depth + 1)  # records by their ids
    for name, each in value.items():
        step = name if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) else json.dumps(name)
        if found := _caption_path(each, f"{path}.{step}", named, depth + 1):
            return found
    return None
