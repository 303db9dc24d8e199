"""Lets the reference show the roles of our docstrings, such as ``:class:`~aioinfer.ServerStats```, as plain code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):(`+)~?([\w.]+)\1")


class Roles(griffe.Extension):
    """Rewrites each docstring when it was read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Keep the last part of each name."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2]}`", obj.docstring.value)
