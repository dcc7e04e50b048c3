"""The error of an invalid config."""

from fastpref.utils.errors import UserError


class ConfigError(UserError):
    """A config that cannot be run, with the path of the field at fault."""
