"""``mmts export``: a trained model for code that has neither OpenCLIP nor this plugin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._files import check_writable
from ..errors import ConfigError, MMTSError

_DESCRIPTION = """\
Write a trained OpenCLIP model as a TorchScript file: torch.jit.load(FILE) has encode_image [N, 3, H, W] and encode_text
[N, L] of token ids, both give unit features [N, D] as the model was trained, and neither OpenCLIP nor this plugin is
needed to run it. Of a product sphere without class tokens also the one line that anyone's code needs is printed.
"""

_EXAMPLES = """\
examples:
  mmts export logs/run/checkpoints/epoch_30.pt -o model.pt
  mmts export weights.pt --model ViT-B-16 -o model.pt
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``export`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help=help,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="epoch_K.pt of OpenCLIP's trainer, or a local folder")
    parser.add_argument("--model", metavar="NAME", help="OpenCLIP's --model; default: what the run's params.txt says")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the TorchScript file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Load, trace, compare with the model, write."""
    output = Path(args.output)
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; -o/--output names the file to write")
    if output.exists() and not args.force:
        raise ConfigError(f"{output}: exists already; pass --force to replace it, or another -o/--output")
    check_writable(output)
    try:
        from ..evaluation import export
    except ImportError as error:
        raise MMTSError(f"mmts export needs {error.name}: pip install 'mmts-plugins[openclip]'") from error
    for line in export.export(args.checkpoint, args.model, output):
        print(line)
    return 0
