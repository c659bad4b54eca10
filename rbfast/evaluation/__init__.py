"""Accuracy of a model: completions of problems, graded and kept (`evaluate`), with intervals (`statistics`)."""
