"""What people look at: plots (`plots`), pages (`html`), and the report of finished runs: `run_report`, with its
`accuracy` and its `examples`, of what `read_run` finds in their folders.
"""
