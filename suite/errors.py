"""Errors that the user can fix: one line (or one line per fault) that names the fix, no traceback, exit status 2."""


class UserError(Exception):
    """Bad input of some kind; str() is ready to print."""


class DataError(UserError):
    """A data set or a data file is not where or what it should be; the message names the place and the fault."""


class SettingError(ValueError):
    """A key, `momentum` or `sharpness.start`, or an entry, `3`, is wrong beside others; for pydantic's validators."""

    def __init__(self, key: str | tuple[str | int, ...], reason: str) -> None:
        """`key` is dotted; or the keys one by one, where one of them has a dot."""
        parts = key.split(".") if isinstance(key, str) else key
        name = ".".join(map(str, parts))
        super().__init__(f"{name}: {reason}" if name else reason)
        self.location = tuple(int(part) if str(part).isdecimal() else part for part in parts)
        self.reason = reason
