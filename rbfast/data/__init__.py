"""Traces and what becomes of them: fields and checks (`trace`), roles (`spans`), files and the hub (`readers`, `hub`),
the shapes people hold traces in (`formats`, of which `fields`, `conversations`, `replies` and `answers` are parts), a
model's prompt (`chat_template`), packed token batches (`encoding`), a teacher's log-probs on disk (`signal_store`).
"""
