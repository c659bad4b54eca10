"""Fixtures for evaluations over a server."""

from scripted_server import no_pauses, start  # noqa: F401  (fixtures)
