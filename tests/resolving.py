"""Flags to a configuration, as OpenCLIP's runs resolve them; the table is not opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmts_plugins import losses
from mmts_plugins.adapters.openclip import ADAPTER
from mmts_plugins.config import Config, of_options
from mmts_plugins.hosts.registry import options_of_hosts
from mmts_plugins.options import COMMON

INFONCE, MAX_MARGIN = "mmts-infonce", "mmts-max-margin"
LOSS_NAMES = losses.choices()
CONFIG_FIELDS = of_options(COMMON)
ALL_FIELDS = of_options((*COMMON, *options_of_hosts()))


def resolve(flags: Mapping[str, Any]) -> Config:
    return ADAPTER.resolve(flags, with_table=False).config
