"""The name under which :mod:`mmts_plugins.tables` was first published."""

from .tables import CAPTION, CLASS, ClusterTable, cluster_shift

__all__ = ["CAPTION", "CLASS", "ClusterTable", "cluster_shift"]
