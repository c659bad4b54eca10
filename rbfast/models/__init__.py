"""Models as they are found: loading a student and its parts (`student`), what counts as a matrix (`linears`), how a
layer uses its weight (`weight_use`) and which can have no delta (`unfit`), attention over packed examples
(`packed_attention`), what others call a model by (`names`).
"""
