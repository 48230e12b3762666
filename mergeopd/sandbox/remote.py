"""Let tests in one process use the objects of a program in another.

The program's side may send anything, so values cross as JSON: plain data is copied (exact built-in types, so
that no method of the program decides a comparison), and everything else is a `Proxy` whose operations run in
the program's process. A comparison or arithmetic operation between a proxy and plain data does not cross: it
would tell the program what the test expects. Standard library only.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

_MAX_MESSAGE = 64 << 20
_MAX_INT = 1 << 53
_DATES: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "datetime": (
        datetime.datetime,
        ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    ),
    "date": (datetime.date, ("year", "month", "day")),
    "time": (datetime.time, ("hour", "minute", "second", "microsecond")),
    "timedelta": (datetime.timedelta, ("days", "seconds", "microseconds")),
}
# What tests may do with an object of the program. The names are those of the messages.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "isinstance": isinstance, "issubclass": issubclass, "getattr": getattr, "setattr": setattr,
    "delattr": delattr, "len": len, "iter": iter, "next": next, "bool": bool, "str": str, "repr": repr,
    "int": int, "float": float, "abs": abs, "hash": hash,
    "neg": operator.neg, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem, "enter": lambda manager: manager.__enter__(),
    "leave": lambda manager: manager.__exit__(None, None, None),
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul",
        "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")},
}  # fmt: skip


class Peer:
    """One end of a connection: sends requests, and answers those of the other side while it waits."""

    def __init__(self, descriptor: int, *, operations: Mapping[str, Callable[..., Any]]) -> None:
        """`operations` are those that the other side may ask for."""
        self._descriptor = descriptor
        self._operations = operations
        self._objects: dict[int, Any] = {}
        self._handles: dict[int, int] = {}  # by id() of the object, which `_objects` keeps alive
        self.exceptions: dict[str, type[Exception]] = {}

    def request(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run an operation on the other side and return its value, or raise its exception."""
        encoded = [self.encode(value) for value in args]
        self.send({"op": name, "args": encoded, "kwargs": {k: self.encode(v) for k, v in kwargs.items()}})
        while True:
            reply = self.receive()
            if "op" in reply:
                self.answer(reply)
                continue
            for index, value in reply.get("changed", {}).items():
                _replace(args[int(index)], self.decode(value))
            if "error" in reply:
                self._raise(reply["error"])
            return self.decode(reply["value"])

    def answer(self, request: dict[str, Any]) -> None:
        """Run an operation that the other side asks for, and reply."""
        given = request["args"]
        args = [self.decode(value) for value in given]
        reply: dict[str, Any]
        try:
            kwargs = {str(name): self.decode(value) for name, value in request["kwargs"].items()}
            reply = {"value": self.encode(self._operations[request["op"]](*args, **kwargs))}
        except BaseException as error:  # noqa: BLE001  a program may raise anything
            reply = {"error": [[kind.__name__ for kind in type(error).__mro__], _text(error)]}
        try:
            changed = {
                index: now
                for index, value in enumerate(args)
                if isinstance(value, list | dict | set | bytearray | collections.deque)
                and (now := self.encode(value)) != given[index]
            }
        except (TypeError, RecursionError):
            changed = {}
        self.send({**reply, **({"changed": changed} if changed else {})})

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        body = json.dumps(message).encode()
        data = memoryview(struct.pack("=I", len(body)) + body)
        while data:
            data = data[os.write(self._descriptor, data) :]

    def receive(self) -> dict[str, Any]:
        """Read one message. Raises ConnectionError when the other side has ended or sends no message."""
        (length,) = struct.unpack("=I", self._read(4))
        if length > _MAX_MESSAGE:
            raise ConnectionError
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise ConnectionError from error
        if not isinstance(message, dict):
            raise ConnectionError
        return message

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = os.read(self._descriptor, min(length - len(parts), 1 << 20))
            if not part:
                raise ConnectionError
            parts += part
        return bytes(parts)

    def _raise(self, error: list[Any]) -> NoReturn:
        """Raise the nearest exception that both sides have."""
        names, text = error
        for name in names:
            kind = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    raised = kind(text)
                except TypeError:  # such as UnicodeDecodeError, which has five arguments
                    continue
                raise raised
        raise RuntimeError(f"{names[0]}: {text}")

    def handle(self, value: object) -> int:
        """Return the number of an own object, always the same."""
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._objects)
            self._objects[len(self._objects)] = value
        return self._handles[id(value)]

    def encode(self, value: Any) -> Any:
        """Convert a value to JSON values. Raises RecursionError for a nesting that is too deep."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Proxy):
            return {"yours": object.__getattribute__(value, "_handle")}
        for kind, convert in _ENCODERS:
            if isinstance(value, kind):
                return convert(self, value)
        return {"mine": self.handle(value)}

    def decode(self, value: Any) -> Any:
        """Convert JSON values to a value of built-in types, or a proxy."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "mine":
            return Proxy(self, int(content))
        if tag == "yours":
            return self._objects[content]
        return _DECODERS[tag](self, content)

    def items(self, values: Any) -> Iterator[Any]:
        return (self.decode(item) for item in values)


def _encode_tuple(peer: Peer, value: tuple[Any, ...]) -> Any:
    items = [peer.encode(item) for item in tuple.__iter__(value)]
    names = getattr(type(value), "_fields", None)
    return {"tuple": items} if names is None else {"named": [type(value).__name__, list(names), items]}


def _encode_dict(peer: Peer, value: dict[Any, Any]) -> Any:
    tag = type(value).__name__ if type(value) in (collections.Counter, collections.OrderedDict) else "dict"
    return {tag: [[peer.encode(key), peer.encode(item)] for key, item in dict.items(value)]}


def _encode_int(peer: Peer, value: int) -> Any:
    number = int.__index__(value)
    return number if -_MAX_INT < number < _MAX_INT else {"int": hex(number)}


def _encode_date(peer: Peer, value: Any) -> Any:
    if getattr(value, "tzinfo", None) is not None:
        return {"mine": peer.handle(value)}
    name, parts = next((name, parts) for name, (kind, parts) in _DATES.items() if isinstance(value, kind))
    return {"date": [name, *(getattr(value, part) for part in parts)]}


# In order: a subclass is encoded as its built-in base.
_ENCODERS: tuple[tuple[type, Callable[[Peer, Any], Any]], ...] = (
    (int, _encode_int),
    (float, lambda peer, value: float.__float__(value)),
    (str, lambda peer, value: str.__str__(value)),
    (list, lambda peer, value: [peer.encode(item) for item in list.__iter__(value)]),
    (tuple, _encode_tuple),
    (dict, _encode_dict),
    (set, lambda peer, value: {"set": [peer.encode(item) for item in set.__iter__(value)]}),
    (frozenset, lambda peer, value: {"frozenset": [peer.encode(i) for i in frozenset.__iter__(value)]}),
    (bytes, lambda peer, value: {"bytes": bytes.hex(value)}),
    (bytearray, lambda peer, value: {"bytearray": bytearray.hex(value)}),
    (complex, lambda peer, value: {"complex": [value.real, value.imag]}),
    (range, lambda peer, value: {"range": [hex(n) for n in (value.start, value.stop, value.step)]}),
    (collections.deque, lambda peer, value: {"deque": [[peer.encode(i) for i in value], value.maxlen]}),
    (fractions.Fraction, lambda peer, value: {"Fraction": str(value)}),
    (decimal.Decimal, lambda peer, value: {"Decimal": str(value)}),
    *((kind, _encode_date) for kind, _ in _DATES.values()),
)
_DECODERS: dict[str, Callable[[Peer, Any], Any]] = {
    "int": lambda peer, content: int(content, 16),
    "tuple": lambda peer, content: tuple(peer.items(content)),
    "named": lambda peer, c: collections.namedtuple(c[0], c[1], rename=True)(*peer.items(c[2])),
    "dict": lambda peer, content: dict(map(tuple, map(peer.items, content))),
    "Counter": lambda peer, content: collections.Counter(dict(map(tuple, map(peer.items, content)))),
    "OrderedDict": lambda peer, content: collections.OrderedDict(map(tuple, map(peer.items, content))),
    "set": lambda peer, content: set(peer.items(content)),
    "frozenset": lambda peer, content: frozenset(peer.items(content)),
    "bytes": lambda peer, content: bytes.fromhex(content),
    "bytearray": lambda peer, content: bytearray.fromhex(content),
    "complex": lambda peer, content: complex(*content),
    "range": lambda peer, content: range(*(int(number, 16) for number in content)),
    "deque": lambda peer, content: collections.deque(peer.items(content[0]), content[1]),
    "Fraction": lambda peer, content: fractions.Fraction(content),
    "Decimal": lambda peer, content: decimal.Decimal(content),
    "date": lambda peer, content: _DATES[content[0]][0](*content[1:]),
}  # fmt: skip


def _replace(target: Any, value: Any) -> None:
    """Give a container that the test passed the content that the program left in it."""
    if type(target) is not type(value):
        return
    if isinstance(target, list | bytearray):
        target[:] = value
    elif isinstance(target, dict | set | collections.deque):
        target.clear()
        if isinstance(target, collections.deque):
            target.extend(value)
        else:
            target.update(value)


def _text(error: BaseException) -> str:
    try:
        # KeyError shows its key by repr.
        return str(error.args[0]) if len(error.args) == 1 else str(error)
    except BaseException:  # noqa: BLE001
        return "(its message cannot be shown)"


class Proxy:
    """An object of the other side."""

    def __init__(self, peer: Peer, handle: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)

    def __getattr__(self, name: str) -> Any:
        return _ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        _ask("delattr", self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask("call", self, *args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Proxy) and _ask("isinstance", instance, self) is True

    def __exit__(self, *_: object) -> None:
        _ask("leave", self)

    def __hash__(self) -> int:
        return int(_ask("hash", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = _ask("iter", self)
        while True:
            try:
                yield _ask("next", iterator) if isinstance(iterator, Proxy) else next(iterator)
            except StopIteration:
                return


def _ask(name: str, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
    peer: Peer = object.__getattribute__(proxy, "_peer")
    return peer.request(name, proxy, *args, **kwargs)


def _plain_operation(name: str, result: type | None = None) -> Callable[..., Any]:
    def operation(self: Proxy, *args: Any) -> Any:
        value = _ask(name, self, *args)
        if result is not None and type(value) is not result:
            raise TypeError(f"{name}() returned a {type(value).__name__}")
        return value

    return operation


def _operation_of_two(name: str, result: type | None = None) -> Callable[[Proxy, object], Any]:
    run = _plain_operation(name, result)
    return lambda self, other: run(self, other) if isinstance(other, Proxy) else NotImplemented


for _name in ("next", "getitem", "setitem", "delitem", "abs", "neg", "enter"):
    setattr(Proxy, f"__{_name}__", _plain_operation(_name))
for _name, _result in (
    ("len", int),
    ("bool", bool),
    ("str", str),
    ("repr", str),
    ("int", int),
    ("float", float),
):
    setattr(Proxy, f"__{_name}__", _plain_operation(_name, _result))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Proxy, f"__{_name}__", _operation_of_two(_name, bool))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"):
    setattr(Proxy, f"__{_name.removesuffix('_')}__", _operation_of_two(_name))

PROGRAM_OPERATIONS: Mapping[str, Callable[..., Any]] = _OPERATIONS
TEST_OPERATIONS: Mapping[str, Callable[..., Any]] = {"call": _OPERATIONS["call"]}
