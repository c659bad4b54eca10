"""Grade answers: the answer in a completion (`grade`), mathematical equality (`math_equality`), a grading process that
can be killed (`judge`), and the problems of tasks and benchmarks (`tasks`).
"""
