"""Writing completions: the token loop (`decoding`), and guidance: what a guide is (`guide`), the state of a completion
under it (`state`, `boundary`), the interface that all models share (`solver`), a local model (`local`, `steering`,
`tokens`), a served one (`remote`), and votes (`vote`).
"""
