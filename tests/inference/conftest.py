"""Fixtures of the tests of the client: a server with a script, and retries that do not wait."""

from scripted_server import no_pauses, start  # noqa: F401  (fixtures)
