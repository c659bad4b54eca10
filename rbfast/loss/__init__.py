"""The distillation loss (`DistillLoss`) and the teacher signals that it takes (`teacher_signal`: `TopK`, `Dense`)."""
