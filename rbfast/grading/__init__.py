"""Whether an answer is right: the answer in a completion (`grade`), equality in mathematics (`math_equality`), a
process that can be killed (`judge`), and where problems come from (`tasks`).
"""
