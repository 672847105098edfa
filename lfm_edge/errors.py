"""Errors that a user can act on: each is one line that says what was wrong, where, and what to do."""

_LONGEST = 1000  # characters of a message


class LfmEdgeError(Exception):
    """Base of every error raised on purpose. The command line prints it and exits with code 2.

    Messages quote files that are not trusted. As text each is one line of some length, whatever it quotes.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


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


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Text from elsewhere for a line of a terminal: what does not print is escaped, the middle of much is left out."""
    if len(text) > longest:
        text = f"{text[:longest // 2]} [...] {text[-longest // 2:]}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
