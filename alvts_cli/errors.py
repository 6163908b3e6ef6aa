"""The one exception that is meant for the user's eyes."""


class AlvtsError(Exception):
    """One clear line for the user: what is wrong, and what to do about it."""
