"""HTTP itself: the socket, the protocol, and the checks before any route."""
