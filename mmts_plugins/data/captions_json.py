"""Captions and labels of JSON: records with a column (a list, or one a line), or a document of a published form."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Optional, TextIO

from ..errors import ConfigError, MMTSError, cause, listed, shown
from . import forms, json_stream
from .opening import opened_text, size_of
from .source import DEFAULT_COLUMNS, Samples, Source, join_labels, pick, require

_MANY_FIELDS = 20  # an object of more texts is no record
_OURS = DEFAULT_COLUMNS["json"][:2]
"""Fields of a record that has one of these are not looked at for a form."""


def read_json(source: Source, labels: Sequence[str], captions: bool) -> Samples:
    """Records with a column of captions, or of a form; a list of captions gives one sample each.

    Lines are read one at a time, and so are the records of a document of over 100 MB; a smaller one is held whole.
    """
    tally = _Tally(source)
    if captions and not labels and size_of(source.data) > json_stream.LARGE:
        form = _large_form(source)
        if form is not None:
            return _read_form(source, form, None, tally)
    with opened_text(source.data) as file:
        document, records = _opened(source, file, tally)
        if document is None:
            return _read_records(source, records, labels, captions, tally)
        form = _form_of(source, document)
        if form is not None and not labels:
            return _read_form(source, form, document, tally)
        if not isinstance(document, list):
            _refuse(source, document)
        numbered = ((f"record {number}", record) for number, record in enumerate(document, 1))
        return _read_records(source, numbered, labels, captions, tally)


def _large_form(source: Source) -> Optional[forms.Form]:
    """The form of a document that is not held whole; ``None`` for records with a column, and for lines."""
    named = forms.form_named(source.format)
    if named is not None or source.format != "auto" or _is_lines(source.data):
        return named
    return json_stream.recognise(source.data)


def _is_lines(path: str) -> bool:
    """Whether the first line is an object by itself."""
    with opened_text(path) as file:
        head = file.readline(1 << 20).strip()
    try:
        return isinstance(json.loads(head), dict)
    except ValueError:
        return False


class _Tally:
    """What is odd about a file's objects, and what was skipped of its lines."""

    def __init__(self, source: Source) -> None:
        self.source, self.repeated, self.damaged = source, 0, 0

    def object_of(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self.repeated += len(found) != len(pairs)
        return found

    def parse(self, text: str) -> Any:
        return json.loads(text, object_pairs_hook=self.object_of)

    def tell(self, samples: Samples) -> Samples:
        if self.repeated:
            samples.notes.append(
                f"{self.source.data}: {self.repeated} objects name a field twice; the last one counts, as in json.load"
            )
        if self.damaged:
            samples.left_out["damaged lines"] = self.damaged
            samples.notes.append(f"{self.source.data}: {self.damaged} damaged lines are left out (--skip-damaged)")
        return samples


# -- records and documents ---------------------------------------------------------------------------------------------


def _opened(source: Source, file: TextIO, tally: _Tally) -> tuple[Any, Iterable[tuple[str, Any]]]:
    """The whole document and nothing, or ``None`` and the records of lines, each with its place."""
    numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    number, head = next(numbered, (0, ""))
    if head.lstrip()[:1] == "[":
        return tally.parse(head + file.read()), ()
    if not head:
        return None, ()
    try:
        first = tally.parse(head)
    except ValueError as error:
        if head.lstrip()[:1] == "{":
            try:
                return tally.parse(head + file.read()), ()
            except ValueError:
                pass
        if not source.skip_damaged:
            raise _not_json(source, number, error) from error
        tally.damaged += 1
        return None, _lines(source, numbered, tally)
    second = next(numbered, None)
    if second is None and isinstance(first, dict) and not _is_record(source, first):
        return first, ()
    rest = () if second is None else _lines(source, chain([second], numbered), tally)
    return None, chain([(f"line {number}", first)], rest)


def _lines(source: Source, numbered: Iterable[tuple[int, str]], tally: _Tally) -> Iterator[tuple[str, Any]]:
    for number, line in numbered:
        try:
            yield f"line {number}", tally.parse(line)
        except ValueError as error:
            if not source.skip_damaged:
                raise _not_json(source, number, error) from error
            tally.damaged += 1


def _not_json(source: Source, number: int, error: Exception) -> MMTSError:
    return MMTSError(
        f"{source.data}: line {number} is not JSON ({cause(error)}); expected a list of objects, or one object per "
        "line; --skip-damaged leaves such lines out"
    )


def _is_record(source: Source, document: dict[str, Any]) -> bool:
    """Whether one object alone is a record, and not a document around all captions."""
    if source.column in document or any(_holds_texts(document.get(name)) for name in DEFAULT_COLUMNS["json"]):
        return True
    if forms.form_named(source.format) or (source.column is not None and forms.is_path(source.column)):
        return False
    containers = any(isinstance(value, (dict, list)) for value in document.values())
    return not containers and len(document) <= _MANY_FIELDS and forms.recognise(document) is None


def _holds_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
    )


def _form_of(source: Source, document: Any) -> Optional[forms.Form]:
    """The form to read a document by; ``None`` for records with a column."""
    named = forms.form_named(source.format)
    if named is not None:
        return named
    column = source.column
    if source.format != "auto" and column is None:
        return None  # records, as --format json says
    first = document[0] if isinstance(document, list) and document else None
    if isinstance(first, dict) and any(name in first for name in (_OURS if column is None else (column,))):
        return None
    found = forms.recognise(document) if source.format == "auto" else None
    if column is None:
        return found
    path = forms.steps(column)
    if found is not None:
        places = (place for _, record in forms.records(found, document) for place in forms.walk(record, path))
        if next(places, None) is not None:
            return found  # another field of its records, such as another language
    if forms.is_path(column) and next(forms.walk(document, path), None) is not None:
        return forms.Form("path", f"--column {column}", "", (), column)
    return None


def _read_form(source: Source, form: forms.Form, document: Any, tally: _Tally) -> Samples:
    found = Samples([], column=source.column, form=form.name)
    if form.name == "path":
        places: Iterable[tuple[str, Any]] = [(source.column or "", document)]
        reader = forms.Reader.of(form, {}, None, None)
    elif document is None:
        others: dict[str, Any] = {}
        if form.joined[0]:
            joined = forms.Form("", "", f"{form.joined[0]}[]", (), "")
            others = {form.joined[0]: [each for _, each in json_stream.records(source.data, joined)]}
        places = json_stream.records(source.data, form)
        reader = forms.Reader.of(form, others, source.column, source.split)
    else:
        places = forms.records(form, document)
        reader = forms.Reader.of(form, document, source.column, source.split)
    splits: dict[Optional[str], int] = {}
    for key, record in places:
        split = reader.split_of(record)
        splits[split] = splits.get(split, 0) + 1
        if reader.wanted and split not in reader.wanted:
            continue
        _take(source, found, reader, key, record)
    _tell_splits(source, found, reader, splits)
    return tally.tell(found)


def _take(source: Source, found: Samples, reader: forms.Reader, key: str, record: Any) -> None:
    for text, image in reader.take(key, record):
        if not isinstance(text, str):
            raise MMTSError(f"{source.data}: record {shown(key)}: a caption is no text but {shown(text)}")
        _check_unicode(source, f"record {shown(key)}", "caption", text)
        found.captions.append(text)
        if image is not None:
            found.images.append(image)


def _tell_splits(source: Source, found: Samples, reader: forms.Reader, splits: dict[Optional[str], int]) -> None:
    if not reader.wanted:
        if source.split is not None and source.split != "all" and not reader.form.split:
            raise ConfigError(f"{source.data}: --split {shown(source.split)}: {reader.form.title} has no splits here")
        return
    others = {split: many for split, many in splits.items() if split not in reader.wanted}
    known = ", ".join(sorted(str(split) for split in splits if split is not None))
    missing = [split for split in reader.wanted if split not in splits]
    if source.split is not None and missing:
        raise ConfigError(f"{source.data}: no split {shown(missing[0])} (--split); found: {known}")
    if len(missing) == len(reader.wanted):
        raise ConfigError(
            f"{source.data}: no split {' or '.join(map(shown, reader.wanted))}, which {reader.form.title} trains on; "
            f"name one with --split (or --split all); found: {known or 'none'}"
        )
    found.how["split"] = ",".join(split for split in reader.wanted if split in splits)
    if others:
        many = sum(others.values())
        found.left_out["records of other splits"] = many
        found.notes.append(
            f"{source.data}: split {found.how['split']} is read; {many} records of "
            f"{', '.join(sorted(map(str, others)))} are left out (--split)"
        )


# -- records with a column ---------------------------------------------------------------------------------------------


def _read_records(
    source: Source, records: Iterable[tuple[str, Any]], labels: Sequence[str], captions: bool, tally: _Tally
) -> Samples:
    if source.split is not None:
        raise ConfigError(f"{source.data}: --split {shown(source.split)}: records have no splits; leave it out")
    found = Samples([], form="json")
    ids: list[list[Optional[str]]] = [[] for _ in labels]
    column, reader = None, None
    for number, (where, record) in enumerate(records):
        if number == 0 and captions and not labels:
            reader = _reader_of(source, record)
            found.form = reader.form.name if reader else found.form
        if reader is not None:
            _take(source, found, reader, where, record)
            continue
        if not isinstance(record, dict):
            hint = "" if not isinstance(record, str) else "; a list of captions is read with --format list"
            raise MMTSError(f"{source.data}: {where} is not an object with named fields, but {shown(record)}{hint}")
        names = list(record)
        values: list[Any] = [None]
        if captions:
            column = column or pick(source, "json", names, _way(source, record))
            require(source, column, names, "--column", f"in {where}")
            values = record[column] if isinstance(record[column], list) else [record[column]]
            for value in values:
                if not isinstance(value, str):
                    raise MMTSError(
                        f"{source.data}: {where}: field {shown(column)} is not text but {shown(value)}"
                        f"{_way(source, record)}"
                    )
                _check_unicode(source, where, column, value)
            found.captions.extend(values)
        for label, target in zip(labels, ids):
            require(source, label, names, source.label_flag, f"in {where}")
            value = record[label]
            if isinstance(value, (list, dict, float)):
                raise MMTSError(f"{source.data}: {where}: {shown(label)} is not a class id but {shown(value)}")
            if value is not None:
                value = str(value)
                _check_unicode(source, where, label, value)
            target.extend([value] * len(values))
    found.column = column or (source.column if reader else None)
    found.labels = join_labels(source, labels, ids)
    return tally.tell(found)


def _reader_of(source: Source, record: Any) -> Optional[forms.Reader]:
    """Of the form that a record on a line is of; ``None`` for a column."""
    named = forms.form_named(source.format)
    form = named or (_form_of(source, [record]) if source.format == "auto" else None)
    if form is not None and form.name != "path":
        return forms.Reader.of(form, [record], source.column, source.split)
    if isinstance(record, dict) and source.column is not None and source.column not in record:
        path = forms.steps(source.column) if forms.is_path(source.column) else []
        if path and next(forms.walk(record, path), None) is not None:
            return forms.Reader(forms.Form("path", "", "[]", (), source.column), path, {}, ())
    return None


def _check_unicode(source: Source, where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MMTSError(
            f"{source.data}: {where}: field {shown(name)} holds half a character, {text[error.start]!a} without its "
            f"other half, which no tokenizer reads: {shown(text)}; mend or drop the record"
        ) from error


# -- what to say of others ---------------------------------------------------------------------------------------------


def _way(source: Source, record: dict[str, Any]) -> str:
    path = forms.caption_path([record])
    if path is None or not path.startswith("[]") or source.column is not None:
        return ""
    inside = path[2:].lstrip(".")
    return f". Its captions may be read with --column {shlex.quote(inside)}" if forms.is_path(inside) else ""


def _refuse(source: Source, document: Any) -> None:
    """Raise an MMTSError: what a document holds, and a flag that reads it."""
    path = forms.caption_path(document)
    way = f"; its captions may be read with: --column {shlex.quote(path)}" if path else (
        "; name the place of the captions with --column, a path such as 'annotations[].caption'")  # fmt: skip
    if source.column is not None:
        way = f"; there is nothing at --column {shown(source.column)}{way if path else ''}"
    if not isinstance(document, dict):
        what = forms.structure(document)
        raise MMTSError(f"{source.data}: is {what}; expected a list of objects, or one a line{way}")
    first, inside = next(iter(document.items()), ("", None))
    what = f", {shown(first)} being {forms.structure(inside)}" if isinstance(inside, (dict, list)) else ""
    names = listed(list(document))
    raise MMTSError(f"{source.data}: is one JSON object of {names}{what}, of no form that is known{way}")
