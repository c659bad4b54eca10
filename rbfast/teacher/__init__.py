"""What a teacher gives: solutions (`solutions`) and log-probs (`logprobs`), from a server (`client`) or a local
model, aligned with the student's tokens (`align`).
"""
