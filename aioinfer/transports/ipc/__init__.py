"""Transports between processes: one framed socket for each client process, and a codec for each kind of request."""
