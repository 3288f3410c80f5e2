"""The command line: each verb reads the run folder that the one before it left."""

from offramp.cli.verbs import app, main

__all__ = ["app", "main"]
