"""What every package needs: whole files (`files`), digests (`sealed`), checked records (`records`),
progress, memory.
"""
