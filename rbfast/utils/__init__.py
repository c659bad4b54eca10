"""Helpers for every package: atomic files (`files`), digests (`sealed`), checked records (`records`), devices,
optional packages, progress, memory.
"""
