"""The cases, a file for each group of the registry, which test_registered.py runs; other test files bring their own."""
