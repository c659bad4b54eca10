"""Experiments, each with a question of its own: `python bench/experiments NAME --help` says which."""
