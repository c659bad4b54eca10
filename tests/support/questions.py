"""Questions for a teacher, and the solutions it writes."""

from rbfast.teacher.solutions import Question

QUESTIONS = [Question(f"What is {n} + 1?", domain="sums", id=f"q{n}") for n in range(12)]


def solve(problem):
    n = int(problem.split()[2])
    return f"<plan>\nAdd one to {n}.\n</plan>\n\nStart at {n}.\n{n} + 1 = {n + 1}\n\n<answer>{n + 1}</answer>"
