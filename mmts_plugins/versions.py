"""Versions of what results depend on."""

from __future__ import annotations

from importlib import metadata
from typing import Optional


def installed_version(package: str) -> Optional[str]:
    """Its version, where there is a package of that name and not only a checkout on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # faiss-gpu for faiss-cpu, or a checkout on the path
        return None
