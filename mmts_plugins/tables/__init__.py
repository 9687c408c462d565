"""Cluster tables, held (:class:`ClusterTable`) or streamed (:class:`LargeTable`), and the shifts of their keys."""

from __future__ import annotations

from typing import Union

from .parts import CAPTION, CLASS
from .shift import cluster_shift
from .streamed import LargeTable, open_table
from .table import ClusterTable, Summary

__all__ = ["CAPTION", "CLASS", "ClusterTable", "LargeTable", "Summary", "Table", "cluster_shift", "open_table"]

Table = Union[ClusterTable, LargeTable]
