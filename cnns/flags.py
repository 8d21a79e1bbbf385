"""What a command-line flag is: one record each, the parser made of them, the types of their values.

Nothing here knows a particular flag: those are in config.py and in the tools. Nothing needs
OneFlow.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cnns.errors import UsageError


@dataclass(frozen=True)
class Flag:
    """Everything that is known of one flag but its name. One with a boolean default is a switch."""

    text: str  # what it does, with its unit; its default is added to it
    parse: Callable[[str], object] = str  # raises ArgumentTypeError
    default: object = None  # what holds unless it is given; None where `otherwise` says it in words
    otherwise: str = ""  # in words, what holds unless it is given
    aliases: tuple[str, ...] = ()  # other spellings, with dashes
    choices: Iterable[str] = ()  # the values there are, if the set is closed
    # Flag and values: it belongs to these values of that flag, and is refused with others.
    needs: tuple[str, tuple[str, ...]] | None = None
    # `run`: what is trained, which a resumed run inherits; `start`: one start of it; `node`: one
    # start on one machine, which may differ between machines.
    of: str = "run"
    fixed: bool = False  # cannot change where a run is resumed
    cuda: bool = False  # only CUDA can do it
    many: bool = False  # takes several values
    metavar: str | None = None

    @property
    def is_switch(self) -> bool:
        """Whether it is True or False, and True without a value."""
        return isinstance(self.default, bool)

    @property
    def help(self) -> str:
        """Its text, with what it needs before it and its default after it."""
        default = self.unless_given
        text = f"{self.whole_text}; unless given, {default}" if default else self.whole_text
        return text.replace("%", "%%")  # argparse formats help texts

    @property
    def whole_text(self) -> str:
        """Its text, with what it needs in front."""
        if self.needs is not None:
            return f"{' and '.join(self.needs[1])} only: {self.text}"
        return f"CUDA only: {self.text}" if self.cuda else self.text

    @property
    def unless_given(self) -> str:
        """What holds unless it is given, in words or as it would be typed."""
        if self.otherwise or self.default is None:
            return self.otherwise
        if self.is_switch:
            return "on" if self.default else "off"
        return show(self.default)

    def add_to(self, group: argparse._ArgumentGroup, name: str) -> None:
        options: dict = {"help": self.help, "type": self.parse, "metavar": self.metavar}
        if self.is_switch:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        if self.choices:
            options["choices"] = sorted(self.choices)
        if self.many:
            options["nargs"] = "+"
        group.add_argument(f"--{name}", *self.aliases, **options)


def show(value: object) -> str:
    """A value as it would be typed."""
    if isinstance(value, tuple | list):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any; other help texts say what happens without the flag."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations whose errors are one line, exit status 2."""

    def __init__(self, description: str, **options: Any):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=HelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


def add_switch(
    group: argparse._ActionsContainer, name: str, text: str, default: bool = False
) -> None:
    """A boolean flag: `--name`, `--name=True` or `--name=False`."""
    group.add_argument(
        name, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=text
    )


class FlagParser(Parser):
    """The same, made of records.

    What it parses holds the flags that were given, and no other: `complete` adds the defaults.
    """

    def __init__(self, description: str, groups: Mapping[str, Mapping[str, Flag]]):
        super().__init__(description, argument_default=argparse.SUPPRESS)
        self.groups = groups
        self.flags = {name: flag for flags in groups.values() for name, flag in flags.items()}
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for name, flag in flags.items():
                flag.add_to(group, name)

    def complete(
        self, given: Namespace, inherited: Mapping[str, object] | None = None
    ) -> Namespace:
        """Every flag: as given, else as inherited, else its default.

        A flag that needs another value of a flag is None, and is refused where it was given.
        Raises UsageError.
        """
        known = {
            name: value for name, value in (inherited or {}).items() if name in self.flags
        } | vars(given)
        args = Namespace(
            **{name: known.get(name, flag.default) for name, flag in self.flags.items()}
        )
        for name, flag in self.flags.items():
            if flag.needs is None:
                continue
            chooser, values = flag.needs
            if getattr(args, chooser) not in values:
                if name in given:
                    raise UsageError(
                        f"--{name} has no effect with --{chooser}={getattr(args, chooser)}; it "
                        f"belongs to {' and '.join(f'--{chooser}={value}' for value in values)}"
                    )
                setattr(args, name, None)
            elif getattr(args, name) is None:  # inherited from a run that did not need it
                setattr(args, name, flag.default)
        return args

    def read(self, argv: Sequence[str] | None) -> Namespace:
        """Parse and complete."""
        return self.complete(self.parse_args(argv))


# Types of values.


def boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """The type of an int or float of at least `low` (more, if `above`) up to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be finite")
        if not (low < value if above else low <= value) or not value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            lower = f"{'above' if above else 'at least'} {low:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {lower}{upper}")
        return value

    return parse


def numbers(count: int | None, *, low: float = -math.inf) -> Callable[[str], tuple[float, ...]]:
    """The type of a comma-separated list of `count` numbers (any count if None)."""

    parse_one = number(float, low)

    def parse(text: str) -> tuple[float, ...]:
        values = tuple(parse_one(part.strip()) for part in text.split(","))
        if count is not None and len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} must be {count} numbers joined by commas")
        return values

    return parse


def interval(low: float, high: float = math.inf) -> Callable[[str], tuple[float, float]]:
    """The type of `a,b` with low < a <= b <= high."""

    def parse(text: str) -> tuple[float, float]:
        a, b = numbers(2)(text)
        if not low < a <= b <= high:
            bound = "" if high == math.inf else f" <= {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a,b with {low:g} < a <= b{bound}")
        return a, b

    return parse


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path is needed, and it is empty")
    return text


def onnx_path(text: str) -> str:
    if not text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .onnx")
    return text
