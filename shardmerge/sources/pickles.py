"""Pickles read as data: a machine for their opcodes that can call nothing. Pure.

A pickle is a program that may name any function of any module and call it. Here a name is a text:
the few that weights need are in a table that the caller gives, with a function of ours for each;
any other is refused. Opcodes that only old or unusual pickles have are refused as well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardmerge.errors import CheckpointError

MAX_BYTES = 256 << 20
"""A thousand bytes for each tensor of the largest checkpoints; the elements are not in it."""
MAX_OPCODES = 20_000_000
"""Bounds memory: an opcode of one byte makes an object of up to 64."""
MAX_NESTING = 200
"""Of marks. Values can be nested deeper by other ways, which does no harm: nothing here goes down
into them, and keys, which are hashed, are flat."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global that a pickle names, of those that are allowed; nothing was imported."""

    text: str


@dataclass(slots=True, eq=False)
class Made:
    """What a pickle wants made of a name: kept as it is described, never made.

    Args:
        name: of the class or function, such as ``deepspeed.runtime.zero.config.ZeroStageEnum``.
        arguments: that it would be called with.
        state: that the object would get; None where there is none.
    """

    name: str
    arguments: tuple[object, ...]
    state: object = None


Maker = Callable[[tuple[object, ...]], object]
Names = Mapping[str, Maker | None]
"""The names that are allowed. A function of ours makes the value; for None, ``Made`` is it."""


class Broken(Exception):
    """A pickle, or what it describes, that is not as it is written; the text says how."""


def load_pickle(
    data: bytes,
    what: str,
    names: Names,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The value that a pickle describes, of plain values, dicts, lists, tuples, sets and ``Made``.

    Args:
        data: the whole pickle.
        what: the pickle, as messages name it.
        names: that are allowed, as ``module.name``.
        persistent: makes the value of a persistent id, for which torch puts its storages.

    Raises:
        CheckpointError: for another name, and for anything that is damaged or too large.
    """
    check_size(len(data), what)
    machine = _Machine(data, names, persistent)
    try:
        return machine.run()
    except _Refused as refused:
        raise CheckpointError(
            f"{what}: refused: it names {refused}, which is none of the few names that weights\n"
            "  need; a program that trusts the file would run it. Nothing of it was run here.\n"
            "  Take the model from a place that you trust, as safetensors; or load it where it\n"
            "  cannot do harm, and save its state dict alone."
        ) from None
    except (Broken, IndexError, KeyError, ValueError, struct.error) as problem:
        raise CheckpointError(
            f"{what}: it cannot be read at byte {machine.position:,} of {len(data):,} of its "
            f"pickle: {_told(problem)}.\n"
            "  It is damaged, or no file of torch. Copy or download it again."
        ) from None


def check_size(nbytes: int, what: str) -> None:
    """Refuse a pickle that is larger than any that describes a model."""
    if nbytes > MAX_BYTES:
        raise CheckpointError(
            f"{what}: {nbytes:,} bytes describe its tensors; at most {MAX_BYTES:,} are read.\n"
            "  Such a file holds more than a model. Save the model's state dict alone."
        )


def _told(problem: Exception) -> str:
    if isinstance(problem, Broken):
        return str(problem)
    if isinstance(problem, UnicodeDecodeError):
        return "a text is not UTF-8"
    return "an opcode lacks what it needs"


class _Refused(Exception):
    pass


class _Machine:
    """The stack, the memo and one method for each opcode that is allowed."""

    def __init__(
        self, data: bytes, names: Names, persistent: Callable[[object], object] | None
    ) -> None:
        self.position = 0
        self._data = data
        self._names = names
        self._persistent = persistent
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        data, count = self._data, 0
        handlers = _HANDLERS
        while True:
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                break
            handler = handlers.get(opcode)
            if handler is None:
                self._refuse_opcode(opcode)
            else:
                handler(self)
            count += 1
            if count > MAX_OPCODES:
                raise Broken(f"it has more than {MAX_OPCODES:,} opcodes")
        value = self._stack.pop()
        if self._stack or self._marks:
            raise Broken("it ends with values that belong nowhere")
        return value

    def _refuse_opcode(self, opcode: int) -> None:
        if opcode in _EXTENSIONS:
            raise _Refused("a registered extension of copyreg, by its number")
        if opcode in _CALLS:
            module, name = self._line(), self._line()
            raise _Refused(f"{module}.{name}" if opcode == ord("i") else "a class to be called")
        raise Broken(f"opcode {opcode:#04x} is not one that torch writes")

    # --- bytes of the pickle ----------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        start = self.position
        if count > len(self._data) - start:
            raise Broken(f"it ends inside of a value of {count:,} bytes")
        self.position = start + count
        return self._data[start : self.position]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position)
        text = self._data[self.position : end].decode()
        self.position = end + 1
        return text

    # --- the stack --------------------------------------------------------------------------------

    def push_mark(self) -> None:
        if len(self._marks) >= MAX_NESTING:
            raise Broken(f"values are nested more than {MAX_NESTING} deep")
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[object]:
        found = self._stack
        self._stack = self._marks.pop()
        return found

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def pop_mark(self) -> None:
        self._since_mark()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    # --- plain values -----------------------------------------------------------------------------

    def frame(self) -> None:
        self._take(8)  # how far it reaches matters to readers of streams only

    def protocol(self) -> None:
        if self._number(1) > 5:
            raise Broken("its protocol is newer than 5")

    def constant(self) -> None:
        self._stack.append(_CONSTANTS[self._data[self.position - 1]]())

    def small_int(self) -> None:
        self._stack.append(self._number(1))

    def two_byte_int(self) -> None:
        self._stack.append(self._number(2))

    def four_byte_int(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def float64(self) -> None:
        (value,) = struct.unpack(">d", self._take(8))
        self._stack.append(value)

    def text(self) -> None:
        size = _TEXT_SIZES[self._data[self.position - 1]]
        self._stack.append(self._take(self._number(size)).decode())

    def octets(self) -> None:
        size = _OCTET_SIZES[self._data[self.position - 1]]
        self._stack.append(self._take(self._number(size)))

    # --- containers -------------------------------------------------------------------------------

    def tuple_of_marked(self) -> None:
        found = tuple(self._since_mark())
        self._stack.append(found)

    def tuple_of_last(self) -> None:
        count = self._data[self.position - 1] - 0x84  # TUPLE1 is 0x85
        if len(self._stack) < count:
            raise Broken("a tuple lacks items")
        found = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(found)

    def list_of_marked(self) -> None:
        self._stack.append(self._since_mark())

    def dict_of_marked(self) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def set_of_marked(self) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(_key, items)))

    def append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def append_all(self) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def add_all(self) -> None:
        items = self._since_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise Broken("items are added to what is no set")
        target.update(map(_key, items))

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._since_mark())

    def _list(self) -> list[object]:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise Broken("items are appended to what is no list")
        return target

    def _set(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise Broken("items are set in what is no dict")
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    # --- the memo ---------------------------------------------------------------------------------

    def put(self) -> None:
        self._memo[self._number(1)] = self._stack[-1]

    def put_long(self) -> None:
        self._memo[self._number(4)] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self) -> None:
        self._stack.append(self._memo[self._number(1)])

    def get_long(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    # --- names, and what they would make ----------------------------------------------------------

    def name(self) -> None:
        module, name = self._line(), self._line()
        self._push_name(module, name)

    def name_of_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(module, name)

    def _push_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Broken("a name is no text")
        text = f"{module}.{name}"
        if text not in self._names:
            raise _Refused(_shown(text))
        self._stack.append(Name(text))

    def make(self) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        self._stack.append(make(name, arguments, self._names))

    def make_with_keys(self) -> None:
        keys = self._stack.pop()
        if keys != {}:
            raise Broken("an object is made with named arguments")
        self.make()

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif isinstance(target, (*_FLAT, list, tuple)):
            raise Broken(f"a {type(target).__name__} is given a state")
        # Of our own values, a state is something that we have no use for (``_metadata``).

    def persistent_id(self) -> None:
        if self._persistent is None:
            raise Broken("it refers to something outside of the file")
        self._stack.append(self._persistent(self._stack.pop()))


def make(name: object, arguments: object, names: Names) -> object:
    """What the pickle wants made, by the function of ours that the table has for the name.

    Raises:
        Broken: for what is no name, or arguments that it does not take.
    """
    if not isinstance(name, Name):
        raise Broken(f"a {type(name).__name__} is to be called")
    if not isinstance(arguments, tuple):
        raise Broken(f"the arguments of {name.text} are no tuple")
    maker = names[name.text]
    return Made(name.text, arguments) if maker is None else maker(arguments)


_FLAT = (str, bytes, int, float, type(None), Made, Name)


def _key(key: object) -> object:
    """A key of a dict or member of a set, if it is one that can be hashed without surprises."""
    if isinstance(key, _FLAT):
        return key
    if isinstance(key, tuple) and all(isinstance(item, _FLAT) for item in key):
        return key
    raise Broken(f"a {type(key).__name__} is used as a key")


def _shown(name: str) -> str:
    return ascii(name)[1:-1] if len(name) <= 200 else f"{ascii(name[:200])[1:-1]}..."


_STOP = ord(".")
_CALLS = frozenset(b"io")  # INST, OBJ
_EXTENSIONS = frozenset(b"\x82\x83\x84")  # EXT1, EXT2, EXT4
_CONSTANTS: Mapping[int, Callable[[], object]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord(")"): tuple,
    ord("]"): list,
    ord("}"): dict,
    0x8F: set,
}
_TEXT_SIZES = {0x8C: 1, ord("X"): 4, 0x8D: 8}
_OCTET_SIZES = {ord("C"): 1, ord("B"): 4, 0x8E: 8}
_HANDLERS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.push_mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("2"): _Machine.duplicate,
    **dict.fromkeys(_CONSTANTS, _Machine.constant),
    ord("K"): _Machine.small_int,
    ord("M"): _Machine.two_byte_int,
    ord("J"): _Machine.four_byte_int,
    0x8A: _Machine.long,
    ord("G"): _Machine.float64,
    **dict.fromkeys(_TEXT_SIZES, _Machine.text),
    **dict.fromkeys(_OCTET_SIZES, _Machine.octets),
    ord("t"): _Machine.tuple_of_marked,
    **dict.fromkeys((0x85, 0x86, 0x87), _Machine.tuple_of_last),
    ord("l"): _Machine.list_of_marked,
    ord("d"): _Machine.dict_of_marked,
    0x91: _Machine.set_of_marked,
    ord("a"): _Machine.append,
    ord("e"): _Machine.append_all,
    0x90: _Machine.add_all,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("q"): _Machine.put,
    ord("r"): _Machine.put_long,
    0x94: _Machine.memoize,
    ord("h"): _Machine.get,
    ord("j"): _Machine.get_long,
    ord("c"): _Machine.name,
    0x93: _Machine.name_of_stack,
    ord("R"): _Machine.make,
    0x81: _Machine.make,  # NEWOBJ
    0x92: _Machine.make_with_keys,  # NEWOBJ_EX
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}
"""By opcode; one that is not here is refused."""
