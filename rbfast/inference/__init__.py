"""Generate completions: the token loop (`decoding`) and its key-value `cache`, the settings of guidance (`guide`),
the state of a guided completion (`state`, `boundary`), the interface that all models share (`solver`), local models
(`local`, `steering`, `tokens`), served models (`remote`), and majority votes (`vote`).
"""
