"""The one exception type for everything a user can cause."""


class UserError(ValueError):
    """Wrong input from a user: the command line prints its one line and exits with code 2.

    Anything else that escapes to the command line is a bug of fastpref and shows a traceback.
    """
