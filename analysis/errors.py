"""What the user can put right."""


class UserError(Exception):
    """The message is one line for the user: the value, then the valid choices or the way out. The program exits 2."""
