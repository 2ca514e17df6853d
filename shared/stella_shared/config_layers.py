"""Several layers of settings → one validated Struct, with messages that name key, value and what is allowed.

Knows nothing of particular keys: the Struct declares them, `checks` holds what a type cannot say.
Faults are collected, not raised, so that one run shows them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from stella_shared import yamltext


class Field(Struct, frozen=True):
    """One key as declared: its dotted name, type, Meta and default."""

    key: str
    kind: Any
    meta: Meta
    default: object


def fields(section: type[Struct], prefix: str) -> list[Field]:
    """Return every key below `section` in the order declared, sections left out."""
    found: list[Field] = []
    defaults = {f.name: f for f in msgspec.structs.fields(section)}
    for name, (kind, meta) in hints(section).items():
        if is_section(kind):
            found += fields(kind, f"{prefix}.{name}")
        else:
            field = defaults[name]
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            found.append(Field(f"{prefix}.{name}", kind, meta, default))
    return found


def allowed(kind: Any, meta: Meta) -> str:
    """Say in words what a key of this type allows."""
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if kind is bool:
        return "true or false"
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return (
            f"a list of mappings with the keys {', '.join(item.__struct_fields__)}"
            if is_section(item)
            else "a list of text"
        )
    if kind is str:
        return "text"
    number = "a whole number" if kind is int else "a number"
    if meta.ge is not None and meta.le is not None:
        return f"{number} from {meta.ge} to {meta.le}"
    return number


@cache
def hints(section: type[Struct]) -> dict[str, tuple[Any, Meta]]:
    """Return name → (bare type, Meta) of a section's fields, in the order declared."""
    found = get_type_hints(section, include_extras=True)
    return {name: (found[name].__origin__, found[name].__metadata__[0]) for name in section.__struct_fields__}


def is_section(kind: Any) -> bool:
    """True when a field's type is a section of further keys."""
    return isinstance(kind, type) and issubclass(kind, Struct)


class Merge:
    """One merging of layers under `root`, whose keys are written `<prefix>.a.b`.

    `origin` names the file and `lines` gives the line of each of its keys, for the messages.
    """

    def __init__(
        self,
        root: type[Struct],
        prefix: str,
        checks: Mapping[str, Callable[[Any], list[str]]],
        origin: str,
        lines: Mapping[str, int],
    ) -> None:
        self.faults: list[str] = []
        self._root = root
        self._prefix = prefix
        self._checks = checks
        self._origin = origin
        self._lines = lines
        self._sources: dict[str, str] = {}

    def document(self, document: object) -> dict[str, Any]:
        """Return the mapping under the top key of a parsed file."""
        if document is None:
            return {}
        if not isinstance(document, dict):
            self.faults.append(f"{self._origin}: expected a mapping with the top key {self._prefix}")
            return {}
        for key in document:
            if key != self._prefix:
                near = get_close_matches(key, [self._prefix])
                meant = f"did you mean {near[0]}?" if near else f"the only top key is {self._prefix}"
                self._fault(key, f"unknown key {key}; {meant}")
        below = document.get(self._prefix)
        if below is None:
            return {}
        if not isinstance(below, dict):
            self._fault(self._prefix, f"{self._prefix} is {shown(below)}; allowed: a mapping of keys")
            return {}
        return below

    def place(self, values: dict[str, Any], keys: list[str], value: object, source: str) -> None:
        """Set `keys` below `values` to `value`; text is read as the key's type says."""
        section = self._root
        path = self._prefix
        for i, key in enumerate(keys):
            path = f"{path}.{key}"
            if key not in hints(section):
                self._sources[path] = source
                self._unknown(section, path)
                return
            kind = hints(section)[key][0]
            last = i == len(keys) - 1
            if is_section(kind) == last:
                what = "is a section, not a key" if last else "has no keys below it"
                self.faults.append(f"{source}: {path} {what}")
                return
            if last:
                self._sources[path] = source
                values[key] = _from_text(kind, value) if isinstance(value, str) else value
            else:
                section = kind
                inner = values.get(key)
                values[key] = values = dict(inner) if isinstance(inner, dict) else {}

    def source(self, key: str) -> str:
        """Return where a key's value came from: a variable, an option, or a file's line; "" when nothing set it."""
        return self._sources.get(key, f"{self._origin}:{self._lines[key]}" if key in self._lines else "")

    def result(self, values: dict[str, Any]) -> Any:
        """Return `values` as a `root`.  What is wrong goes to `faults`, its default stands instead."""
        return self._struct(self._root, values, self._prefix)

    def _struct(self, section: type[Struct], values: dict[str, Any], path: str) -> Any:
        good: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{path}.{name}"
            if name not in hints(section):
                self._unknown(section, key)
                continue
            kind, meta = hints(section)[name]
            if is_section(kind):
                if value is None or isinstance(value, dict):
                    good[name] = self._struct(kind, value or {}, key)
                else:
                    self._fault(key, f"{key} is {shown(value)}; allowed: a mapping of keys")
                continue
            try:
                good[name] = msgspec.convert(value, Annotated[kind, meta])
            except msgspec.ValidationError as e:
                if not self._item_faults(kind, value, key, str(e)):
                    self._fault(key, f"{key} is {shown(value)}; allowed: {allowed(kind, meta)}{_advice(kind, value)}")
                continue
            for text in self._checks.get(key, _no_faults)(good[name]):
                self._fault(key, f"{key}{text}" if text.startswith("[") else f"{key} {text}")
        return section(**good)

    def _item_faults(self, kind: Any, value: object, key: str, reason: str) -> bool:
        """Note what is wrong within a list of mappings: unknown keys by their nearest one; return whether it is one."""
        item: Any = get_args(kind)[0] if get_origin(kind) is list else None
        if not is_section(item) or not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            return False
        unknown = [(n, name) for n, one in enumerate(value) for name in one if name not in item.__struct_fields__]
        for n, name in unknown:
            near = get_close_matches(str(name), item.__struct_fields__, 1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(item.__struct_fields__)}"
            self._fault(key, f"unknown key {key}[{n}].{name}; {meant}")
        if not unknown:
            # msgspec names the place last: "Expected `str`, got `int` - at `$[0].binary`".
            what, _, place = reason.partition(" - at `$")
            self._fault(key, f"{key}{place.rstrip('`')}: {what[:1].lower()}{what[1:]}")
        return True

    def _fault(self, key: str, text: str) -> None:
        """Note a fault of `key`, led by where the key came from."""
        source = self.source(key)
        self.faults.append(f"{source}: {text}" if source else text)

    def _unknown(self, section: type[Struct], key: str) -> None:
        """Note an unknown key, naming the nearest known one: a sibling, else one of that name elsewhere."""
        name = key.rpartition(".")[2]
        known = [f.key for f in fields(self._root, self._prefix)]
        near = (
            get_close_matches(name, section.__struct_fields__, 1)
            or [k for k in known if k.rpartition(".")[2] == name]
            or get_close_matches(key, known, 1, 0.8)
        )
        meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(section.__struct_fields__)}"
        self._fault(key, f"unknown key {key}; {meant}")


def _from_text(kind: Any, text: str) -> object:
    """Read a variable's or flag's text as `kind` wants it; what does not fit stays text."""
    if kind is str or get_origin(kind) is Literal:
        return text
    if get_origin(kind) is list:
        if text.lstrip().startswith("["):
            return yamltext.parse(text.encode(), "")[0]
        return [item.strip() for item in text.split(",") if item.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def shown(value: object) -> str:
    """Return a value for a message, bounded in length."""
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _advice(kind: Any, value: object) -> str:
    """Return what to write instead, where a common slip is seen."""
    if get_origin(kind) is list and value is None:
        return " (write [] for an empty list)"
    if kind is str and isinstance(value, int | float):
        return f' (put it in quotes: "{value}")'
    return ""


def _no_faults(_: Any) -> list[str]:
    return []
