"""Every exception that bytekiln raises on purpose, each defined once.

All of them say `where: what was found; expected what`. Leaves also inherit the builtin
that a caller would catch anyway, so `except FileNotFoundError`-style code keeps working.
The Rust core raises these same classes (one mapping, in the binding's `error.rs`).
"""

from __future__ import annotations


class BytekilnError(Exception):
    """Root of everything that bytekiln raises for a user's mistake; exit status 2 on the command line."""


class ConfigError(BytekilnError, ValueError):
    """A parameter, field or preset has a value that cannot work."""


class FileError(BytekilnError, OSError):
    """A file or folder is missing, unreadable, a directory, empty, or cannot be written."""


class OutputExistsError(BytekilnError, FileExistsError):
    """An output exists already and nobody asked to resume or overwrite it."""


class TextError(BytekilnError, ValueError):
    """Text cannot be taken: invalid UTF-8 under the policy `error`, or a disallowed special token."""


class FormatError(BytekilnError, ValueError):
    """A tokenizer, token file, checkpoint or results file is malformed or truncated."""


class MismatchError(BytekilnError, ValueError):
    """Two artefacts do not belong together: tokenizer hash, checksum, or configuration differ."""


class MissingExtraError(BytekilnError, ImportError):
    """An optional package is needed; the message has the `pip install` that brings it."""


class DivergedError(BytekilnError, ArithmeticError):
    """Training stopped because the loss is not finite or ran away; exit status 3."""
