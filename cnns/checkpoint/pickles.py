"""Pickles as data: dicts, lists, numbers, texts and tensors, and nothing else.

A pickle is a program, and `pickle.load` runs it: it imports what the file names and calls it. Here
its instructions are read by a loop of our own that knows a fixed list of them. A name in the file
is compared with a table and never imported; a call does what the table says, or is refused. So
there is nothing in a file that could run.
"""

import math
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_BYTES = 4 << 20  # of the instructions; those of a ResNet-50 take 50 kB
# Of instructions and of items of calls: a pickle takes a few seconds and some 500 MB at most.
MAX_WORK = 2_000_000
MAX_NUMBER_BITS = 128
MAX_NAME = 200  # characters of what is called
MAX_DIMENSIONS, MAX_COUNT = 8, 1 << 50  # of a tensor, and its numbers
MARK = object()
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # of the weights in a dict
DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError)


class Refused(Exception):
    """A pickle that is damaged, or holds more than data."""


@dataclass(frozen=True)
class Name:
    """What a file names: `collections.OrderedDict`."""

    text: str


@dataclass
class Stub:
    """An instance of a class that the file names, with the state that the file gives it."""

    name: str
    state: dict = field(default_factory=dict)


@dataclass
class Reader:
    """What one kind of file may hold.

    Args:
        calls: what stands for a call of a name, by that name.
        classes: names of which instances become a `Stub`.
        persistent: turns a persistent id into a value; None: refused.
    """

    calls: dict[str, Callable[..., Any]]
    classes: frozenset[str] = frozenset()
    persistent: Callable[[Any], Any] | None = None

    def read(self, data: bytes, start: int = 0) -> tuple[Any, int]:
        """The value of the pickle at `start` of `data`, and where it ends. Raises Refused."""
        data = data[start : start + MAX_BYTES]
        try:
            value, length = self.run(pickletools.genops(data))
            return value, start + length
        except Refused:
            raise
        except (*DAMAGE, RecursionError):
            if len(data) == MAX_BYTES:
                raise Refused(f"its pickle has no end within {MAX_BYTES} bytes") from None
            raise Refused("its pickle is damaged or cut off") from None

    def run(self, instructions: Iterable) -> tuple[Any, int]:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        work = 0
        for code, argument, position in instructions:
            kind = code.name
            work += 1
            if work > MAX_WORK:
                raise Refused(f"its pickle takes more than {MAX_WORK} steps")
            if kind in CONSTANTS:
                stack.append(CONSTANTS[kind]())
            elif kind in LITERALS:
                if isinstance(argument, int) and argument.bit_length() > MAX_NUMBER_BITS:
                    raise Refused(f"a number in it has more than {MAX_NUMBER_BITS} bits")
                stack.append(argument)
            elif kind == "MARK":
                stack.append(MARK)
            elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif kind == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif kind in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif kind in TUPLES:
                stack.append(tuple(pop(stack, TUPLES[kind])))
            elif kind in ("TUPLE", "LIST"):
                items = pop_to_mark(stack)
                stack.append(items if kind == "LIST" else tuple(items))
            elif kind in ("APPEND", "APPENDS"):
                items = pop(stack, 1) if kind == "APPEND" else pop_to_mark(stack)
                expect(stack[-1], list).extend(items)
            elif kind in ("DICT", "SETITEM", "SETITEMS"):
                items = pop(stack, 2) if kind == "SETITEM" else pop_to_mark(stack)
                if kind == "DICT":
                    stack.append({})
                set_items(expect(stack[-1], dict), items)
            elif kind == "GLOBAL":
                stack.append(make_name(*argument.split(" ", 1)))
            elif kind == "STACK_GLOBAL":
                module, name = pop(stack, 2)
                stack.append(make_name(expect(module, str), expect(name, str)))
            elif kind == "REDUCE":
                name, arguments = pop(stack, 2)
                work += sum(len(each) for each in arguments if isinstance(each, list | tuple))
                stack.append(self.call(expect(name, Name), expect(arguments, tuple)))
            elif kind == "NEWOBJ":
                name, arguments = pop(stack, 2)
                stack.append(self.make(expect(name, Name), arguments))
            elif kind == "BUILD":
                (state,) = pop(stack, 1)
                self.build(stack[-1], state)
            elif kind == "BINPERSID" and self.persistent is not None:
                stack.append(self.persistent(stack.pop()))
            elif kind == "STOP":
                return stack.pop(), position + 1
            elif kind not in ("PROTO", "FRAME"):
                raise Refused(
                    f"its pickle has the instruction {kind}, which no dict of tensors has"
                )
        raise ValueError("no end")

    def call(self, name: Name, arguments: tuple) -> Any:
        if name.text not in self.calls:
            raise Refused(f"it would call {excerpt(name.text)}, and only dicts of tensors are read")
        return self.calls[name.text](*arguments)

    def make(self, name: Name, arguments: tuple) -> Any:
        if name.text not in self.classes or arguments != ():
            raise Refused(f"it holds a {excerpt(name.text)}, and only dicts of tensors are read")
        return Stub(name.text)

    @staticmethod
    def build(value: Any, state: Any) -> None:
        if isinstance(value, Stub):
            value.state = expect(state, dict)
        elif not isinstance(value, dict):  # of an ordered dict it is what PyTorch notes beside it
            raise Refused("it sets the state of something that is not a tensor")


CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),  # of Python 2
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def make_name(module: str, name: str) -> Name:
    if len(module) + len(name) > MAX_NAME:
        raise Refused(f"a name in its pickle has more than {MAX_NAME} characters")
    return Name(f"{module}.{name}")


def ordered_dict(pairs: Any = ()) -> dict:
    """What stands for `collections.OrderedDict`."""
    result: dict = {}
    for pair in expect(pairs, list | tuple):
        if len(expect(pair, list | tuple)) != 2:
            raise Refused("its pickle is not a dict of tensors")
        set_items(result, list(pair))
    return result


def excerpt(text: str) -> str:
    """The beginning of a text from a file, in ASCII, for a message."""
    return ascii(text)[1:-1][:80]


def expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise Refused("its pickle is not a dict of tensors")
    return value


def set_items(target: dict, items: list) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[expect(key, str | int)] = value


def pop(stack: list, count: int) -> list:
    items = stack[-count:]
    if len(items) < count or any(item is MARK for item in items):
        raise ValueError("nothing on the stack")
    del stack[-count:]
    return items


def pop_to_mark(stack: list) -> list:
    at = len(stack) - 1
    while stack[at] is not MARK:  # an IndexError without one
        at -= 1
        if at < 0:
            raise ValueError("no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise Refused("a size in it is not a whole number, or too large")
    return value


def check_shape(dimensions: Any) -> tuple[int, ...]:
    """The shape of a tensor, one that an array can have. Raises Refused."""
    if len(dimensions) > MAX_DIMENSIONS:
        raise Refused("a tensor in it has an impossible shape")
    shape = tuple(map(whole, dimensions))
    if math.prod(max(1, n) for n in shape) > MAX_COUNT:
        raise Refused("a tensor in it has an impossible shape")
    return shape


def find_weights(value: Any, kind: type, *, depth: int = 3) -> dict:
    """The dict of tensors in what a file holds: the whole, or what is below `state_dict`."""
    if not isinstance(value, dict) or depth == 0:
        raise Refused("it holds no dict of tensors")
    if value and all(isinstance(item, kind) for item in value.values()):
        if not all(isinstance(name, str) for name in value):
            raise Refused("its tensors have no names")
        return value
    for wrapper in WRAPPERS:
        if isinstance(value.get(wrapper), dict):
            return find_weights(value[wrapper], kind, depth=depth - 1)
    for name, item in value.items():
        if not isinstance(item, kind):
            raise Refused(f"{excerpt(str(name))} in it is not a tensor")
    raise Refused("it holds no tensors")
