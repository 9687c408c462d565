"""Something-Something-v2's label files and the clip ids of a split of SSv2-LT to annotations as VAST reads them."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from mmts_plugins._files import replacing
from mmts_plugins.errors import MMTSError, TableError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=Path, nargs="+", required=True,
                        help="SSv2's train.json and validation.json (fields id, label, template)")  # fmt: skip
    parser.add_argument("--split", type=Path, required=True, help="a clip id in the first column of each line")
    parser.add_argument("--separator", default=",", help="of the split's columns")
    parser.add_argument("-o", "--output", type=Path, required=True, help="for example ssv2_lt/train.json")
    return parser.parse_args()


def annotations(labels: list[dict[str, Any]], clips: list[str]) -> list[dict[str, str]]:
    """The full caption of each clip (no "something"), and its class, the template.

    Raises:
        TableError: a clip without a label.
    """
    known = {str(label["id"]): label for label in labels}
    absent = [clip for clip in clips if clip not in known]
    if absent:
        raise TableError(f"{len(absent)} of {len(clips)} clips of the split have no label, for example {absent[0]!r}")
    template = {clip: known[clip]["template"].replace("[", "").replace("]", "") for clip in clips}
    return [{"video_id": clip, "desc": known[clip]["label"], "template": template[clip]} for clip in clips]


def main() -> int:
    args = parse_args()
    try:
        labels = [label for path in args.labels for label in json.loads(path.read_text(encoding="utf-8"))]
        with args.split.open(newline="", encoding="utf-8") as file:
            clips = [row[0].strip() for row in csv.reader(file, delimiter=args.separator) if row and row[0].strip()]
    except (OSError, ValueError) as error:
        raise MMTSError(f"the labels or the split cannot be read: {error}") from error
    made = annotations(labels, clips)
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    classes = len({annotation["template"] for annotation in made})
    print(f"{args.output}: {len(made)} clips of {classes} classes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MMTSError as error:
        sys.exit(f"error: {error}")
