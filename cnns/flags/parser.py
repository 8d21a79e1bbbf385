"""Command-line flags: a record for each, and the parser that is built from the records.

Nothing here knows a particular flag: those are in the other files of this folder and in the tools.
Nothing needs OneFlow.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import cnns
from cnns.errors import UsageError
from cnns.flags.values import BOOLEANS, boolean
from cnns.hints import FOREIGN, NOT_NEEDED, nearest, nearest_flag

LOOKS_LIKE_A_FLAG = re.compile(r"-[A-Za-z-][^\s=]*(=|$)")


@dataclass(frozen=True)
class Flag:
    """All about one flag but its name. One with a boolean default, or type, is a switch."""

    text: str  # what it does, with its unit; its default is added to it
    parse: Callable[[str], object] = str  # raises ArgumentTypeError
    default: object = None  # its value unless given; None where `otherwise` describes it
    otherwise: str = ""  # a description of what holds unless it is given
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
        """Whether its values are True and False, with True for the bare flag."""
        return isinstance(self.default, bool) or self.parse is boolean

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
        """What holds unless it is given: a description, or a value as typed."""
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
    """A value as typed on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any; other help texts say what happens without the flag."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class ShowVersion(argparse.Action):
    """Prints the versions of the toolkit, of OneFlow, which is not loaded for it, and of Python."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            oneflow = importlib.metadata.version("oneflow")
        except importlib.metadata.PackageNotFoundError:
            oneflow = "not installed"
        script, python = os.path.basename(sys.argv[0]), platform.python_version()
        print(f"{script} {cnns.__version__} (OneFlow {oneflow}, Python {python})")
        parser.exit()


def examples(doc: str | None) -> str:
    """The commands in a script's docstring, its second paragraph, for the top of its help."""
    paragraphs = (doc or "").split("\n\n")
    lines = textwrap.dedent("".join(paragraphs[1:2])).strip().splitlines()
    shown = "\n".join(f"  {line}" for line in lines if not line.endswith(" --help"))
    return f"Examples:\n{shown}\n\n" if shown else ""


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations whose errors are one line, exit status 2.

    Dashes within the names of flags are taken as underscores. What is not known gets a hint at what
    comes nearest. `doc` is the script's docstring: its commands stand at the top of the help.
    """

    def __init__(self, description: str, *, doc: str | None = None, **options: Any):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=HelpFormatter, **options
        )
        self.examples = examples(doc)
        text = "show the versions of the toolkit, OneFlow and Python, and exit"
        nothing = argparse.SUPPRESS
        self.add_argument(
            "--version", action=ShowVersion, nargs=0, dest=nothing, default=nothing, help=text
        )

    def format_help(self) -> str:
        return self.examples + super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self.with_known_flags(words), namespace)

    def with_known_flags(self, words: list[str]) -> list[str]:
        """The words of a command with underscores in flags. Ends where flags are not known."""
        known, unknown, found = self._option_string_actions, [], []
        for i, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                found += words[i:]  # values, or what is for the parser of a job
                break
            name, equals, value = word.partition("=")
            if name not in known and LOOKS_LIKE_A_FLAG.match(word):
                spelled = f"--{name[2:].replace('-', '_')}" if name[:2] == "--" else name
                if spelled not in known:
                    unknown.append(word + self.hint(name.strip("-").replace("-", "_")))
                word = spelled + equals + value
            found.append(word)
        if unknown:
            self.error(f"unrecognized arguments: {'; '.join(unknown)}")
        return found

    def hint(self, name: str) -> str:
        """What a flag that is not known, without dashes in front, may have been meant to be."""
        actions = {
            option.removeprefix("--"): action
            for option, action in self._option_string_actions.items()
            if option.startswith("--")
        }
        near = nearest_flag(name, actions)
        if name in NOT_NEEDED and near not in FOREIGN.get(name, ()):
            return f": {NOT_NEEDED[name]}"
        if near is None:
            return ""
        text = (actions[near].help or "").partition(";")[0].replace("%%", "%")
        return f": did you mean --{near} ({text})?"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = ", ".join(map(repr, action.choices))
        near = nearest(str(value), map(str, action.choices))
        hint = f", did you mean {near!r}?" if near else ""
        raise argparse.ArgumentError(
            action, f"invalid choice: {value!r}{hint} (choose from {choices})"
        )


def add_switch(
    group: argparse._ActionsContainer, name: str, text: str, default: bool = False
) -> None:
    """A boolean flag: `--name`, `--name=True` or `--name=False`."""
    group.add_argument(
        name, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=text
    )


CONFIGURED = "flags_of_config"  # where what was parsed holds the flags of the file of --config


class FlagParser(Parser):
    """The same, built from records.

    Parsing gives only the flags on the command line; `complete` adds the defaults.
    """

    def __init__(
        self,
        description: str,
        groups: Mapping[str, Mapping[str, Flag]],
        *,
        rest: str | None = None,
        **options: Any,
    ):
        """`rest` is the flag that values without a flag belong to."""
        values = f" [{rest.upper()} ...]" if rest else ""
        super().__init__(
            description,
            argument_default=argparse.SUPPRESS,
            usage=f"%(prog)s{values} [--FLAG[=VALUE] ...]",
            **options,
        )
        self.groups, self.rest = groups, rest
        self.flags = {name: flag for flags in groups.values() for name, flag in flags.items()}
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for name, flag in flags.items():
                flag.add_to(group, name)

    def with_known_flags(self, words: list[str]) -> list[str]:
        words = super().with_known_flags(words)
        if self.rest is None:
            return words
        # A value behind a switch is the switch's only where it can be: `--use_fp16 cat.jpg`.
        switches = {f"--{name}" for name, flag in self.flags.items() if flag.is_switch}
        ends = [*words[1:], ""]
        return [
            f"{word}=True" if word in switches and end.lower() not in BOOLEANS else word
            for word, end in zip(words, ends, strict=False)
        ]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        given, values = super().parse_known_args(args, namespace)
        if self.rest is None or not values:
            return given, values
        values = [value for value in values if value != "--"]
        setattr(given, self.rest, [*getattr(given, self.rest, []), *values])
        return given, []

    def complete(
        self, given: Namespace, inherited: Mapping[str, object] | None = None
    ) -> Namespace:
        """Every flag: as given, else as in --config, else as inherited, else its default.

        A flag that needs another value of a flag is None, and is refused where it was given.
        Raises UsageError.
        """
        configured: dict[str, object] = getattr(given, CONFIGURED, {})
        before = {**(inherited or {}), **configured}
        known = {name: value for name, value in before.items() if name in self.flags} | vars(given)
        args = Namespace(
            **{name: known.get(name, flag.default) for name, flag in self.flags.items()}
        )
        for name, flag in self.flags.items():
            if flag.needs is None:
                continue
            chooser, values = flag.needs
            if getattr(args, chooser) not in values:
                if name in given:
                    chosen = getattr(args, chooser)
                    other = (
                        f"without --{chooser}" if chosen is None else f"with --{chooser}={chosen}"
                    )
                    raise UsageError(
                        f"--{name} has no effect {other}; it "
                        f"belongs to {' and '.join(f'--{chooser}={value}' for value in values)}"
                    )
                setattr(args, name, None)
            elif getattr(args, name) is None:  # inherited from a run that did not need it
                setattr(args, name, flag.default)
        return args

    def read(self, argv: Sequence[str] | None) -> Namespace:
        """Parse and complete."""
        return self.complete(self.parse_args(argv))
