"""One ASGI app over a server: robots, HTTP, clients on other machines, and metrics, on one port.

``app.py`` says which path is served by what. ``openpi.py``, ``stream.py``, ``open_inference.py`` and ``act.py`` are the
protocols; all of them ask through ``front.py``, which has the limits, the sessions and the counts.
"""

from aioinfer.web.app import App, create_app
from aioinfer.web.limits import Limits

__all__ = ["App", "Limits", "create_app"]
