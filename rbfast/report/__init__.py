"""Plots (`plots`), HTML pages (`html`), and the report of finished runs: `run_report` renders what `read_run` finds in
their folders, with the sections `accuracy` and `examples`.
"""
