"""What the user can put right: one line (or one line per fault) that names the fix, no traceback, exit status 2."""


class UserError(Exception):
    """Bad input of some kind; str() is ready to print."""


class DataError(UserError):
    """A data set or a data file is not where or what it should be; the message names the place and the fault."""
