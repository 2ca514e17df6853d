"""YAML text → values and line numbers, with everything surprising refused.

Only the safe tags; no duplicate keys (YAML 1.2, section 3.2.1.3), no anchors or aliases (a few lines of them
can stand for gigabytes), one document, bounded depth.
"""

from __future__ import annotations

from typing import Any, Final

import yaml

from stella_shared.errors import ConfigError

MAX_DEPTH: Final = 16
_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))


def parse(data: bytes, origin: str) -> tuple[object, dict[str, int]]:
    """Return the value of the only document and the line (from 1) of each dotted key; None when it is empty.

    `origin` leads the messages.  Raises `ConfigError`.
    """
    where = f"{origin}:" if origin else ""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{where} not UTF-8 at byte {e.start}".strip()) from None
    lines: dict[str, int] = {}
    try:
        _refuse_aliases_and_depth(text, where)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, "", lines, where)), lines
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f"{where}{mark.line + 1}: " if mark else where
        raise ConfigError(f"{line}{e.problem or e.context}".strip()) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} {str(e).splitlines()[0]}".strip()) from None


def _refuse_aliases_and_depth(text: str, where: str) -> None:
    """Look at the events alone, which needs no recursion, before anything is built from them."""
    depth = 0
    event: Any
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{where}{line}: anchors and aliases are not allowed; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}{line}: nested deeper than {MAX_DEPTH} levels")


def _value(loader: Any, node: Any, path: str, lines: dict[str, int], where: str) -> object:
    """Build the value of `node`, noting the line of each key."""
    at = f"{where}{node.start_mark.line + 1}: "
    if node.tag not in _TAGS:
        raise ConfigError(f"{at}the tag {node.tag} is not allowed")
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, path, lines, where) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError):
            raise ConfigError(f"{at}{node.value[:80]!r} is not a {node.tag.rpartition(':')[2]}") from None
    result: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}{line}: a key must be text")
        key = str(key_node.value)
        dotted = f"{path}.{key}" if path else key
        if key in result:
            raise ConfigError(f"{where}{line}: duplicate key {dotted}, first given on line {lines[dotted]}")
        lines[dotted] = line
        result[key] = _value(loader, value_node, dotted, lines, where)
    return result
