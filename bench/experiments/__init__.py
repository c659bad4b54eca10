"""Experiments, one question each: `python bench/experiments NAME --help` states it."""
