"""What people look at: plots (`plots`), pages (`html`), and the report of finished runs (`run_report`, which reads
them with `read_run`).
"""
