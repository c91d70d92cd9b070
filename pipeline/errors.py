"""Errors a user can act on, each with the exit code its command ends with."""

from __future__ import annotations


class MaelstromError(Exception):
    """Base of every error that is a message to the user, not a defect of the program."""

    exit_code = 1


class ConfigError(MaelstromError, ValueError):
    """A setting, path or option that cannot work; nothing was started."""

    exit_code = 2


class DataError(MaelstromError):
    """A dataset that is missing, incomplete, damaged or changed."""

    exit_code = 3


class InfrastructureError(MaelstromError):
    """Storage, network or a device that failed after its retries; the same command may succeed
    later."""

    exit_code = 76
