"""Token ids from text, and text from token ids."""
