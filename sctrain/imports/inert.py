"""Pickles read without running anything of theirs: what they name is recorded, never imported, never called.

A pickle is a program for a stack machine. Here the operations that make objects know a short list of names, each
answered by a stand-in of ours that remembers what it is given; every other name, and every operation that could reach
anything else, ends the reading. Large byte strings stay where they are in the file.
"""

import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

LARGE = 1024  # bytes; longer strings are views of the file
MOST_READS = 20_000_000  # operations and their arguments; EDM2's largest network has 60,000
_WRONG = (
    *(pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError, AttributeError),
    *(OverflowError, MemoryError, RecursionError, struct.error, AssertionError),
)
_KEYS = (str, bytes, int, float, bool, type(None))  # of dictionaries: nested tuples take forever to hash
_ALLOWED = (
    "MARK STOP POP POP_MARK DUP BININT BININT1 LONG1 BININT2 NONE BINPERSID BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 GLOBAL EMPTY_DICT BINGET LONG_BINGET EMPTY_LIST BINPUT LONG_BINPUT TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_TUPLE BINFLOAT NEWTRUE NEWFALSE PROTO EMPTY_SET STACK_GLOBAL MEMOIZE"
).split()


class NotInertError(Exception):
    """Why bytes are not read, as a clause."""


@dataclass
class Recorded:
    """An object of the file: which class it says it is of, and its state."""

    name: str
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """What stands for one global of a pickle: `call` answers a call of it, `new` makes an object of it."""

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None


class Source:
    """Bytes of a file with a position, which are counted as they are read and never copied at large."""

    def __init__(self, data: memoryview):
        self.data, self.position, self._reads = data, 0, 0

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
            raise NotInertError("it has more operations than any network needs")
        return bytes(self.view(count))

    def readline(self) -> bytes:
        end = self.position
        while end < len(self.data) and self.data[end] != 10 and end - self.position < LARGE:
            end += 1
        return self.read(min(end + 1, len(self.data)) - self.position)

    def view(self, count: int) -> memoryview:
        """The next `count` bytes, in place."""
        if not 0 <= count <= len(self.data) - self.position:
            raise NotInertError("it is cut short, or claims more bytes than it has")
        self.position += count
        return self.data[self.position - count : self.position]


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read as they are needed."""
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise NotInertError("it is empty") from error


class InertUnpickler(pickle._Unpickler):  # the one in C reserves whatever memory a pickle claims to need
    """Reads one pickle; `names` are the globals it may name, `storage` what persistent numbers stand for."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _ALLOWED
    }

    def __init__(
        self,
        source: Source,
        names: Callable[[str, str], Name | None],
        storage: Callable[[Any], Any] | None = None,
    ):
        super().__init__(source, encoding="bytes")
        self._source, self._names, self._storage = source, names, storage

    def load(self) -> Any:
        """What the pickle holds. NotInertError for anything but plain values and recorded objects."""
        try:
            return super().load()
        except NotInertError:
            raise
        except _WRONG as error:
            raise NotInertError(f"it is no pickle of a network ({type(error).__name__})") from error

    def find_class(self, module: str, name: str) -> Name:
        found = self._names(_text(module), _text(name))
        if found is None:
            raise NotInertError(f"it names {_text(module)}.{_text(name)}, which no network needs")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise NotInertError("it refers to something outside itself")
        return self._storage(pid)

    def _refuse(self, what: str) -> NoReturn:
        raise NotInertError(what)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            self._refuse("it calls something that is no function of a network's")
        self.stack[-1] = function.call(*arguments)

    def _newobj(self) -> None:
        arguments = self.stack.pop()
        self._new(arguments)

    def _newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        if keywords:
            self._refuse("it makes an object with keywords")
        self._new(arguments)

    def _new(self, arguments: Any) -> None:
        made = self.stack[-1]
        if not isinstance(made, Name) or made.new is None or arguments != ():
            self._refuse("it makes an object of no class of a network's")
        self.stack[-1] = made.new()

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Recorded):
            made.state = state
        elif not isinstance(made, dict):  # an ordered dictionary may carry attributes, which nobody needs
            self._refuse("it changes something that is no object of its own")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put({key: value} if isinstance(key, _KEYS) else self._refuse("a key is no plain value"))

    def _setitems(self) -> None:
        items = self.pop_mark()
        if not all(isinstance(key, _KEYS) for key in items[::2]):
            self._refuse("a key is no plain value")
        self._put(dict(zip(items[::2], items[1::2], strict=True)))

    def _put(self, items: dict[Any, Any]) -> None:
        made = self.stack[-1]
        target = made.items if isinstance(made, Recorded) else made
        if not isinstance(target, dict):
            self._refuse("it puts items into something that is no dictionary")
        target.update(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            self._refuse("it appends to something that is no list")
        self.stack[-1].extend(items)

    def _additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set) or not all(isinstance(item, _KEYS) for item in items):
            self._refuse("a set is not of plain values")
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        if not all(isinstance(item, _KEYS) for item in items):
            self._refuse("a set is not of plain values")
        self.append(frozenset(items))

    def _bytes(self, count: int) -> None:
        self.append(self._source.view(count) if count > LARGE else self._source.read(count))

    def _binbytes8(self) -> None:
        self._bytes(struct.unpack("<Q", self.read(8))[0])

    def _binbytes(self) -> None:
        self._bytes(struct.unpack("<I", self.read(4))[0])

    def _short_binbytes(self) -> None:
        self._bytes(self.read(1)[0])

    def _frame(self) -> None:
        self.read(8)  # frames only announce how much is to be read at once

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BINBYTES8[0]: _binbytes8,
        pickle.BYTEARRAY8[0]: _binbytes8,
        pickle.BINBYTES[0]: _binbytes,
        pickle.SHORT_BINBYTES[0]: _short_binbytes,
        pickle.FRAME[0]: _frame,
    }


def _text(name: str | bytes) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else name
