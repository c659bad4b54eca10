"""From files of traces to token batches.

- Traces: their fields and checks (`trace`), the roles of their text (`spans`).
- Reading: files and the hub (`readers`, `row_files`, `hub`), the known formats (`formats`, built on `row`, `fields`,
  `conversations`, `replies`, `answers`, `choices`, `rendered` and `wrappers`).
- Chat templates: thinking tags (`thinking_marks`), how a template renders thinking (`thinking`), the prompt
  (`chat_template`) and its instruction (`instruction`).
- Training data: the student's completion (`completions`), packed batches (`encoding`), a teacher's log-probs on disk
  (`signal_store`).
"""
