"""Errors that the user can fix: one line (or one line per fault) that names the fix, no traceback, exit status 2."""


class UserError(Exception):
    """Bad input of some kind; str() is ready to print."""


class DataError(UserError):
    """A data set or a data file is not where or what it should be; the message names the place and the fault."""


class SettingError(ValueError):
    """A key, `momentum` or `sharpness.start`, or an entry, `3`, is wrong beside others; for pydantic's validators."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.location = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        self.reason = reason
