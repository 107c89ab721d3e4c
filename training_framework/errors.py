"""The one kind of error that is the user's to mend."""

import reprlib

__all__ = ["UserError", "one_line", "shown"]

_MOST_CHARACTERS = 10_000  # two paths of the greatest length and what is said of them

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = 200
_short_repr.maxlist = _short_repr.maxtuple = _short_repr.maxdict = 8
_short_repr.maxlevel = 3


class UserError(ValueError):
    """Bad input: one line that names the thing (file, key, sample) and says the cure.

    The command line prints it without a traceback and exits with 2; in Python it is a ValueError.

    Args:
        fault: What is wrong, naming the file, the key and the value.
        cure: What to do about it.

    >>> str(UserError("my.yaml: unknown key 'epoch'", "did you mean 'epochs'?"))
    "my.yaml: unknown key 'epoch'; did you mean 'epochs'?"
    """

    def __init__(self, fault: str, cure: str) -> None:
        self.fault = one_line(fault)
        self.cure = one_line(cure)
        super().__init__(f"{self.fault}; {self.cure}")


def one_line(text: str) -> str:
    """Text on one line that a terminal can show: what it would obey or hide is escaped.

    A file's name may hold newlines, terminal commands and bytes that are no text.

    >>> one_line("a\\n b\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    line = " ".join(text.split())
    if len(line) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        line = f"{line[:half]} ... {line[-half:]}"
    if line.isprintable():
        return line
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in line
    )


def shown(value: object) -> str:
    """A value from a user's file as Python writes it, shortened: it may be as large as it likes."""
    try:
        return _short_repr.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"a {type(value).__name__} of too many digits"
