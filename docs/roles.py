"""Lets the reference show what Markdown has not: roles, such as ``:class:`~aioinfer.ServerStats```, as plain code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):(`+)~?([\w.]+)\1")
_BLOCK = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites each docstring when it was read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Keep the last part of each name, and one colon of the two that begin a block."""
        if obj.docstring is not None:
            shown = _ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = _BLOCK.sub(":", shown)
