"""Models as they are found: loading a student and its parts (`student`), what counts as a matrix (`linears`),
attention over packed examples (`packed_attention`).
"""
