"""Random JSON schemas and regular expressions, and whether a text is valid under them."""

import json
import re
from typing import Any

import jsonschema
import numpy as np

WORDS = ["", "a", "name", "two words", 'q"uote', "back\\slash", "née", "日本", "😀", "a/b", "\n"]


def random_schema(rng: np.random.Generator, depth: int = 3) -> dict[str, Any]:
    """A schema whose valid texts are all short, apart from white space."""
    scalars = [_text, _enum, _const, _integer, _number, _boolean, _null, _pattern, _format]
    nested = [_object, _array, _tuple, _any_of, _reference]
    kinds = nested * 2 + scalars if depth == 3 else nested + scalars if depth else scalars
    return kinds[rng.integers(len(kinds))](rng, depth)


def _text(rng, depth):
    shortest = int(rng.integers(0, 4))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + int(rng.integers(12))}


def _enum(rng, depth):
    values = [*WORDS, 0, -7, 3.25, True, None, [1, "x"], {"k": []}]
    picked = rng.permutation(len(values))[: rng.integers(1, 6)]
    return {"enum": [values[i] for i in picked]}


def _const(rng, depth):
    return {"const": [WORDS[rng.integers(len(WORDS))], {"deep": [None, 1]}][rng.integers(2)]}


def _integer(rng, depth):
    low = int(rng.integers(-500, 500))
    return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 2000))}


def _number(rng, depth):
    # Not bounds alone: a fraction may go on for ever, and a random model lets it.
    return {"type": "number", "enum": [float(x) / 4 for x in rng.integers(-50, 50, 3)]}


def _boolean(rng, depth):
    return {"type": ["boolean", "null"]} if rng.random() < 0.5 else {"type": "boolean"}


def _null(rng, depth):
    return {"type": "null"}


def _pattern(rng, depth):
    return {"type": "string", "pattern": f"^{random_regex(rng, 2)}$"}


def _format(rng, depth):
    return {"type": "string", "format": str(rng.choice(["date", "uuid", "ipv4"]))}


def _object(rng, depth):
    names = [WORDS[i] for i in rng.permutation(len(WORDS))[: rng.integers(0, 5)]]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng, depth):
    fewest = int(rng.integers(0, 2))
    return {
        "type": "array",
        "items": random_schema(rng, depth - 1),
        "minItems": fewest,
        "maxItems": fewest + int(rng.integers(0, 3)),
    }


def _tuple(rng, depth):
    items = [random_schema(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng, depth):
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.integers(1, 4))]}


def _reference(rng, depth):
    return (
        {"$defs": {"it": random_schema(rng, depth - 1)}, "$ref": "#/$defs/it"}
        if depth == 3
        else (_any_of(rng, depth))
    )


def random_regex(rng: np.random.Generator, depth: int = 3) -> str:
    """A regular expression, the same for Python and Rust, that matches only short texts."""
    atoms = [
        "a",
        "[b-d]",
        r"\d",
        "[^a-z]",
        "é",
        r"\.",
        "x{2,3}",
        "(?:no|yes)",
        "[A-F0-9]{4}",
        "日?",
    ]
    if depth == 0 or rng.random() < 0.3:
        return atoms[rng.integers(len(atoms))]
    parts = [random_regex(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if rng.random() < 0.4:
        return f"(?:{'|'.join(parts)})"
    return f"(?:{''.join(parts)}){rng.choice(['', '?', '{1,3}'])}"


def is_valid(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON that is valid under a schema."""
    try:
        jsonschema.validate(
            json.loads(text),
            schema,
            cls=jsonschema.Draft202012Validator,
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def matches(pattern: str, text: str) -> bool:
    """Whether a text matches a regular expression as a whole."""
    return re.fullmatch(pattern, text) is not None
