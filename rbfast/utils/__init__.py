"""What every package needs and none is about: whole files (`files`), digests (`sealed`), checked records (`records`),
progress, memory.
"""
