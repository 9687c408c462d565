"""Records of a JSON document that is too large to hold: one at a time, with ijson."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Optional

from ..errors import MMTSError
from . import forms
from .opening import decompressed, open_bytes

LARGE = 100_000_000  # bytes of the file; a document takes some ten times its size in memory
_MANY_KEYS = 100


def records(path: str, form: forms.Form) -> Iterator[tuple[str, Any]]:
    """The records of a form, each with its key, or its number."""
    prefix, by_key = _prefix(form.records)
    ijson = _ijson(path)
    with open_bytes(path) as raw, decompressed(raw) as file:
        if by_key:
            yield from ijson.kvitems(_bare(file), prefix, use_float=True)
        else:
            numbered = enumerate(ijson.items(_bare(file), prefix, use_float=True), 1)
            yield from ((str(number), record) for number, record in numbered)


def recognise(path: str) -> Optional[forms.Form]:
    """As :func:`.forms.recognise`; reads the document through once, where one of a few fields holds the records."""
    names: set[str] = set()
    with open_bytes(path) as raw, decompressed(raw) as file:
        events = _ijson(path).parse(_bare(file))
        is_list = next(events)[1] == "start_array"
        for prefix, event, value in () if is_list else events:
            if (prefix, event) == ("", "map_key"):
                names.add(value)
                if len(names) > _MANY_KEYS:  # of records, not of a document
                    break
    inside = [form for form in forms.FORMS if form.records[:-2] in names]
    whole = [form for form in forms.FORMS if form.records == ("[]" if is_list else "{}")]
    return next(
        (form for form in (*inside, *whole) if forms.fits(form, (record for _, record in records(path, form)))), None
    )


def _prefix(path: str) -> tuple[str, bool]:
    """A path of records as ijson has it, and whether they have keys."""
    *outside, (last, _) = forms.steps(path)
    names = [name for kind, name in outside if kind == "field"]
    return ".".join([*names, *(["item"] if last == "items" else [])]), last == "values"


def _bare(file: IO[bytes]) -> IO[bytes]:
    """Without the mark that some editors put in front."""
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    return file


def _ijson(path: str) -> Any:
    try:
        import ijson
    except ImportError as error:
        raise MMTSError(
            f"{path}: a JSON document of over {LARGE / 1e6:.0f} MB is read with ijson: pip install ijson"
        ) from error
    return ijson
