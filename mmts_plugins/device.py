"""The device that work outside of training is done on."""

from __future__ import annotations

from typing import Optional

import torch


def pick_device(device: Optional[str]) -> torch.device:
    """The device asked for, else a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
