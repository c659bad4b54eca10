"""Measure a model's accuracy: complete, grade and store problems (`evaluate`), with intervals (`statistics`)."""
