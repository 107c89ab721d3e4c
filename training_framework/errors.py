"""`UserError`: the one kind of error that the user can fix."""

import reprlib

__all__ = ["UserError", "one_line", "shown"]

_MAX_CHARACTERS = 10_000  # two paths of the greatest length, and the message about them

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = 200
_short_repr.maxlist = _short_repr.maxtuple = _short_repr.maxdict = 8
_short_repr.maxlevel = 3


class UserError(ValueError):
    """Bad input: one line that names the culprit (file, key, sample) and how to fix it.

    The command line prints it without a traceback and exits with 2; Python sees a ValueError.

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
    """The text on one line, with every character escaped that a terminal would obey or hide.

    A file's name may contain newlines, terminal commands and bytes that are not text.

    >>> one_line("a\\n b\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    line = " ".join(text.split())
    if len(line) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        line = f"{line[:half]} ... {line[-half:]}"
    if line.isprintable():
        return line
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in line
    )


def shown(value: object) -> str:
    """A value from a user's file as Python writes it, shortened however large it is."""
    try:
        return _short_repr.repr(value)
    except ValueError:  # Python refuses to write a number of more than 4300 digits
        return f"a {type(value).__name__} with too many digits"
