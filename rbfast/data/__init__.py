"""Traces and what becomes of them: fields and checks (`trace`), roles (`spans`), files and the hub (`readers`, `hub`),
the shapes people hold traces in (`formats`, of which `fields`, `conversations`, `replies` and `answers` are parts), the
marks around thinking (`thinking_marks`), how a model's chat template thinks (`thinking`), its prompt (`chat_template`)
and what that says (`instruction`), what the student writes (`completions`), packed token batches (`encoding`), a
teacher's log-probs on disk (`signal_store`).
"""
