"""Fixtures for the client tests: a scripted server, and retries without pauses."""

from scripted_server import no_pauses, start  # noqa: F401  (fixtures)
