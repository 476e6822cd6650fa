"""Ways to damage a file, drawn from a random generator: what disks, transfers, editors, other programs and mistaken users do to it.

`damage` takes any file; it knows JSON, JSON lines, YAML and safetensors, and says in words what it did.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

BILLION = 10**9
# Of every JSON type, and of each the values that programs stumble over.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, BILLION, -BILLION, 10**30, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "text", "\ud800", "a\x00b", "\u202eabc", "e\u0301", "\U0001f642", "../../etc", "org/name", " a b ", "1e5"),
    *([], [None], [1, "2"], [["deep"]], {}, {"": None}, {"a": {"b": []}}),
)
ODD_NAMES = ("", " ", "\ud800", "\x00", "\u202e", "\U0001f642", "colour", "__class__", "self")
DEPTH = 100_000  # of nested lists, which a recursive parser does not survive


def damage(path: Path, others: list[Path], rng: random.Random) -> tuple[str, str]:
    """Damage one file, which is there before.

    Args:
        path: the file; afterwards it may be missing, or a folder, a link or a pipe.
        others: files that may take its place.

    Returns:
        kind of damage, and a sentence that says what was done.
    """
    ways: list[Callable[[Path, random.Random], str]] = [
        *(_flipped, _flipped, _truncated, _emptied, _zeroed, _repeated, _random_bytes),
        *(_missing, _folder, _dangling, _loop, _link_to_folder, _pipe),
    ]
    if others:
        ways += [_swapped(others)] * 2
    if path.suffix in (".json", ".jsonl", ".yaml", ".pending"):
        ways += [_value, _value, _value, _value, _value, _key, _added, _top, _deep, _twice, _bom, _utf16, _surrogate]
    if path.suffix == ".yaml":
        ways += [_aliases, _tag]
    if path.suffix == ".safetensors":
        ways += [_tensor, _tensor, _tensor, _values, _values, _renamed, _left_out, _dtype, _header_size, _deep_header]
    way = rng.choice(ways)
    return getattr(way, "kind", way.__name__.strip("_").replace("_", " ")), f"{path.name}: {way(path, rng)}"


# Bytes


def _flipped(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return _random_bytes(path, rng)
    # Half of them near the start, where headers are.
    place = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))
    bit = rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} flipped"


def _truncated(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    kept = rng.choice((1, 8, size // 2, size - 1, rng.randrange(size + 1)))
    os.truncate(path, kept)
    return f"cut to {kept} of {size} bytes"


def _emptied(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "empty"


def _zeroed(path: Path, rng: random.Random) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return "all bytes are 0"


def _repeated(path: Path, rng: random.Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "its content twice"


def _random_bytes(path: Path, rng: random.Random) -> str:
    path.write_bytes(rng.randbytes(rng.randrange(1, 400)))
    return "random bytes"


def _swapped(others: list[Path]) -> Callable[[Path, random.Random], str]:
    def swap(path: Path, rng: random.Random) -> str:
        other = rng.choice(others)
        shutil.copyfile(other, path)
        return f"content of {other.parent.name}/{other.name}"

    swap.kind = "swapped"  # type: ignore[attr-defined]
    return swap


# The file system


def _missing(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "missing"


def _folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def _dangling(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to("nowhere at all")
    return "a link to nothing"


def _loop(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself"


def _link_to_folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(".")
    return "a link to its folder"


def _pipe(path: Path, rng: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe that nobody writes to"


# JSON and YAML


def _load(path: Path, rng: random.Random) -> tuple[Any, Callable[[Any], None]]:
    """The value of the file, or of one of its lines, and what writes another one in its place."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return yaml.safe_load(text), lambda value: _write(path, yaml.safe_dump(value, sort_keys=False))
    if path.suffix != ".jsonl":
        return json.loads(text), lambda value: _write(path, json.dumps(value))
    lines = text.splitlines()
    index = rng.randrange(len(lines))

    def write(value: Any) -> None:
        _write(path, "\n".join([*lines[:index], json.dumps(value), *lines[index + 1 :]]) + "\n")

    return json.loads(lines[index]), write


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """The way to each value inside of a value: keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*place, key), *_places(inner, (*place, key)))]


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """What holds a random value inside of ``value``, and its key there. Half of them are fields at the top."""
    places = _places(value)
    if not places:
        return [value], 0
    top = [place for place in places if len(place) == 1]
    *way, key = rng.choice(top if rng.random() < 0.5 else places)
    for step in way:
        value = value[step]
    return value, key


def _value(path: Path, rng: random.Random) -> str:
    value, write = _load(path, rng)
    holder, key = _place(value, rng)
    odd = rng.choice(ODD_VALUES)
    was, holder[key] = holder[key], odd
    write(value)
    return f"{key} is {odd!r} instead of {_short(was)}"


_value.kind = "other value or type"  # type: ignore[attr-defined]


def _key(path: Path, rng: random.Random) -> str:
    value, write = _load(path, rng)
    holder, key = _place(value, rng)
    del holder[key]
    write(value)
    return f"{key} is missing"


_key.kind = "field missing"  # type: ignore[attr-defined]


def _added(path: Path, rng: random.Random) -> str:
    value, write = _load(path, rng)
    holders = [value, *(_at(value, place) for place in _places(value))]
    holder = rng.choice([h for h in holders if isinstance(h, dict)] or [{}])
    name, odd = rng.choice(ODD_NAMES), rng.choice(ODD_VALUES)
    holder[name] = odd
    write(value)
    return f"{name!r} added: {odd!r}"


_added.kind = "field added"  # type: ignore[attr-defined]


def _at(value: Any, place: tuple) -> Any:
    for step in place:
        value = value[step]
    return value


def _top(path: Path, rng: random.Random) -> str:
    _, write = _load(path, rng)
    odd = rng.choice(ODD_VALUES)
    write(odd)
    return f"{odd!r} instead of an object"


_top.kind = "other value or type"  # type: ignore[attr-defined]


def _deep(path: Path, rng: random.Random) -> str:
    depth = 800 if path.suffix == ".yaml" else DEPTH  # PyYAML reads each level slowly
    nested = "[" * depth + "]" * depth
    _write(path, nested if rng.random() < 0.3 else f'{{"training": {nested}}}')
    return f"{depth} nested lists"


def _twice(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    value, _ = _load(path, rng)
    if not isinstance(value, dict) or not value:
        return _emptied(path, rng)
    key, odd = rng.choice(list(value)), rng.choice((None, 3, "other"))
    if path.suffix == ".yaml":
        _write(path, f"{text}\n{key}: {json.dumps(odd)}\n")
    else:
        before, brace, after = text.partition("{")
        _write(path, f"{before}{brace}{json.dumps(key)}: {json.dumps(odd)}, {after}")
    return f"{key} is there twice"


_twice.kind = "key twice"  # type: ignore[attr-defined]


def _bom(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return "with a byte order mark"


def _utf16(path: Path, rng: random.Random) -> str:
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))
    return "in UTF-16"


def _surrogate(path: Path, rng: random.Random) -> str:
    path.write_bytes(path.read_bytes().replace(b'"', b'"\xed\xa0\x80', 1))
    return "a half of a surrogate pair in its bytes"


def _aliases(path: Path, rng: random.Random) -> str:
    """Each list holds the one before ten times: ten lines, and a billion items for who copies them or writes them down."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    _write(path, "\n".join([path.read_text(encoding="utf-8"), *lines, "seeds: *a9", ""]))
    return "aliases of aliases"


def _tag(path: Path, rng: random.Random) -> str:
    _write(path, path.read_text(encoding="utf-8") + "\nmodel: !!python/object/apply:os.getcwd []\n")
    return "a tag that asks for a function of Python"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


# safetensors


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(header: dict[str, Any], rng: random.Random) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def _tensor(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name = _entry(header, rng)
    odd = rng.choice(([BILLION, BILLION], [2**63, 2], [BILLION], [-1, 4], [], [0], "text", None, [1.5], [True, 4]))
    field = rng.choice(("shape", "shape", "data_offsets"))
    header[name][field] = odd
    _join(path, header, data)
    return f"{field} of {name} is {odd}"


_tensor.kind = "header of another shape"  # type: ignore[attr-defined]


def _values(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name = _entry(header, rng)
    begin, end = header[name]["data_offsets"]
    odd = rng.choice((float("nan"), float("inf"), 3e38))
    floats = struct.pack("<f", odd)
    changed = bytearray(data)
    changed[begin : begin + 4] = floats
    if rng.random() < 0.3:
        changed[begin:end] = floats * ((end - begin) // 4)
    _join(path, header, bytes(changed))
    return f"{name} holds {odd}"


_values.kind = "NaN, infinite or huge values"  # type: ignore[attr-defined]


def _renamed(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name, new = _entry(header, rng), rng.choice(("a\x00b", "heads", "\U0001f642", "", "lora_A", "x" * 10_000))
    header[new] = header.pop(name)
    _join(path, header, data)
    return f"{name} is called {_short(new)}"


_renamed.kind = "tensor renamed"  # type: ignore[attr-defined]


def _left_out(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    begin, _ = header.pop(name)["data_offsets"]
    _join(path, header, data[:begin])
    return f"{name} is missing"


_left_out.kind = "tensor missing"  # type: ignore[attr-defined]


def _dtype(path: Path, rng: random.Random) -> str:
    header, data = _parts(path)
    name = _entry(header, rng)
    entry = header[name]
    dtype, size = rng.choice(
        (("I32", 4), ("U32", 4), ("F16", 2), ("BF16", 2), ("F8_E5M2", 1), ("F4", 0), ("X", 4), ("C64", 8))
    )
    entry["dtype"] = dtype
    if size and entry["shape"] and entry["shape"][-1] * 4 % size == 0:
        entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] * 4 // size]
    _join(path, header, data)
    return f"{name} is {dtype}"


_dtype.kind = "tensor of another dtype"  # type: ignore[attr-defined]


def _header_size(path: Path, rng: random.Random) -> str:
    size = rng.choice((0, 1, 2**20, BILLION, 2**63 - 1, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return f"its header claims {size} bytes"


def _deep_header(path: Path, rng: random.Random) -> str:
    _join(path, '{"a": ' + "[" * DEPTH + "]" * DEPTH + "}", b"")
    return f"a header of {DEPTH} nested lists"
