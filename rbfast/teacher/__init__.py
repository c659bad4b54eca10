"""What a teacher gives: solutions (`solutions`) and log-probs (`logprobs`), from a server (`client`), a provider with
an API of its own (`providers`) or a local model, aligned with the student's tokens (`align`). A reply is asked for as a
job (`jobs`), one by one or in batches (`batch`, by a `batch_api`), read (`chat_reply`), kept (`reply_store`) and paid
for (`budget`).
"""
