"""How long tests wait for what must come: so long that a hang is told from a machine with much else to do."""

from __future__ import annotations

HANG = 60.0
"""Seconds for a reply, or whatever else a process does that runs already."""

IMPORTS = 100.0
"""Seconds for a process that has to import torch first, beside many others that do."""
