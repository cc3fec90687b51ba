"""The EOS token that a tokenizer names, without loading the tokenizer. Imports no JAX.

transformers, which knows it too, takes seconds to import, and the engine needs nothing else of it.
"""

import json
from pathlib import Path
from typing import Any


def read_eos_token_id(path: str | Path) -> int | None:
    """Returns the id of the tokenizer's `eos_token`, as transformers reads it.

    Args:
      path: the directory of tokenizer.json, and of tokenizer_config.json or the older
        special_tokens_map.json, which name the token.

    Returns:
      None if the files name no EOS token or cannot be read: loading the tokenizer will say why.
    """
    path = Path(path)
    settings = _read_object(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(path / "special_tokens_map.json")
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    tokenizer = _read_object(path / "tokenizer.json")
    try:
        ids = tokenizer["model"]["vocab"] | {
            added["content"]: added["id"] for added in tokenizer["added_tokens"]
        }
    except (KeyError, TypeError):
        return None
    token_id = ids.get(token)
    return token_id if type(token_id) is int else None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
