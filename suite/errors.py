"""Errors that the user can fix, shown without a traceback: one line per fault, which names the fix; exit status 2."""


class UserError(Exception):
    """Invalid input; str() is ready to print."""


class DataError(UserError):
    """A data set or data file is missing or invalid; the message names its path and the fault."""


class SettingError(ValueError):
    """A key (`momentum`, `sharpness.start`) or entry (`3`) conflicts with others; raised in pydantic's validators."""

    def __init__(self, key: str | tuple[str | int, ...], reason: str) -> None:
        """`key` is a dotted key, or a tuple of keys if one of them contains a dot."""
        parts = key.split(".") if isinstance(key, str) else key
        name = ".".join(map(str, parts))
        super().__init__(f"{name}: {reason}" if name else reason)
        self.location = tuple(int(part) if str(part).isdecimal() else part for part in parts)
        self.reason = reason
