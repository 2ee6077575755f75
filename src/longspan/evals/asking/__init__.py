"""Who is asked an eval's questions, and what comes of it: askers, runs that resume, rows and tables.

`asker.py` has the contract of who answers, `rows.py` that of a row, `run.py` asks and writes.
"""
