"""On-policy distillation: the student writes (`samples`), and a teacher beside it corrects every token, in `rounds`."""
