"""Errors that a user can act on: each is one line that says what was wrong, where, and what to do."""


class LfmEdgeError(Exception):
    """Base of every error raised on purpose. The command line prints it and exits with code 2."""


class CheckpointError(LfmEdgeError):
    """A checkpoint is missing, damaged, or not of a kind that can be exported."""


class ConfigError(LfmEdgeError):
    """config.json describes a model that cannot be built."""


class BundleError(LfmEdgeError):
    """A bundle is missing, damaged, or was made for something else."""


class ExportError(LfmEdgeError):
    """An export cannot be done as asked."""


class ContextFull(LfmEdgeError):
    """More tokens were given than the context holds; the session is unchanged."""
