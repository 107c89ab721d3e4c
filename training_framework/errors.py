"""The one kind of error that is the user's to mend."""

__all__ = ["UserError"]


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
        self.fault = " ".join(fault.split())
        self.cure = " ".join(cure.split())
        super().__init__(f"{self.fault}; {self.cure}")
