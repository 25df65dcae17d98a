"""The one exception family of the library. Every message names the argument or file, its value, and what it must be."""


class ReLibraError(Exception):
    """Anything this library refuses or fails at."""


class InputError(ReLibraError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(InputError):
    """An array or tensor has the wrong shape, dtype or layout."""


class FormatError(ReLibraError):
    """A file is missing, damaged, or not in the format that it should be in."""


class PlanError(ReLibraError):
    """A plan breaks one of its rules, or was made for something else."""


class CommunicationError(ReLibraError):
    """A collective failed: a rank died, or did not answer within the process-group timeout."""
