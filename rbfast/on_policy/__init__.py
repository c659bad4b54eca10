"""On-policy distillation: the student writes (`samples`), a teacher scores every token (beside it, or a
`served_teacher`), and the student is trained on that, in `rounds`."""
