"""Clients on other machines: requests travel over a WebSocket, many in one message."""
