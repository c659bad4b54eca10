"""Writing completions: the token loop (`decoding`), guidance as a state machine (`guide`, `boundary`), over a local
model (`local`) or a server (`remote`), and votes (`vote`).
"""
