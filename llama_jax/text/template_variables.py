"""The variables of a chat template that a request may set. Imports no JAX."""

import re
from typing import Any

import jinja2
from jinja2 import nodes

# Set by the server or by Jinja, or functions that transformers gives to every template.
_RESERVED = {
    *("messages", "tools", "custom_tools", "documents", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "loop", "self", "caller"),
    *("raise_exception", "strftime_now"),
}
# A tag of transformers, which Jinja itself does not know.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Returns the names that a template reads and never sets, unless they are not defined.

    Those of Llama 3.1 are `builtin_tools`, `date_string` and `tools_in_user_message`.

    Args:
      tokenizer: of transformers, with a chat template that works.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        template = environment.parse(_GENERATION.sub("", tokenizer.get_chat_template()))
    except jinja2.TemplateError:  # written for extensions of another program
        return frozenset()
    read: set[str] = set()
    written: set[str] = set()
    _collect(template, read, written, frozenset())
    given = _RESERVED | environment.globals.keys() | {*tokenizer.special_tokens_map}
    return frozenset(read - written - given)


def _collect(node: nodes.Node, read: set[str], written: set[str], tested: frozenset[str]) -> None:
    """Adds the names that a node reads, and those it sets outside `if name is not defined`."""
    if isinstance(node, nodes.If):
        tested |= {
            test.node.name
            for test in (node.test, *node.test.find_all(nodes.Test))
            if isinstance(test, nodes.Test) and isinstance(test.node, nodes.Name)
            if test.name in ("defined", "undefined")
        }
    if isinstance(node, nodes.Macro):
        written.add(node.name)
    if isinstance(node, nodes.Name):
        if node.ctx == "load":
            read.add(node.name)
        elif node.name not in tested:
            written.add(node.name)
    for child in node.iter_child_nodes():
        _collect(child, read, written, tested)
