"""The cases, one file per group of the registry, run by test_registered.py; other test files define their own."""
