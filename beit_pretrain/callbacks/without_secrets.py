"""A configuration that may leave this machine: addresses without passwords and signatures."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "..."  # in the place of what is left out
_USER = re.compile(r"(?<=://)[^/?#\s]*@")  # name:password@ in front of a host
_QUERY = re.compile(r"(://[^?#\s]*)[?#]\S*")  # where signed addresses have their signature
_NAMES = re.compile(
    r"(^|_)(passw(or)?d|secret|token|credentials?|authorization|(api|access|secret)_key)$"
)  # of options


def without_secrets(value: Any, name: str = "") -> Any:
    """Plain containers anew, without what only their owner should know; `name` is the option that holds `value`."""
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if _NAMES.search(name.lower()):
        return HIDDEN
    if value.startswith("pipe:"):
        return f"pipe:{HIDDEN}"  # a command, which may hold anything
    return _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub("", value))
