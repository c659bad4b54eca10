"""The distillation loss: `DistillLoss`, and what a teacher can give it (`teacher_signal`: `TopK`, `Dense`)."""
