"""From a checked request to its tokens, and from tokens to a response."""
