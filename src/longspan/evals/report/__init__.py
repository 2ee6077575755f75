"""Reports of evals: journals of any eval become tables with intervals, pictures and one page.

Rows become samples (`samples`), samples cells with intervals (`scores`, `evals/statistics.py`), cells tables and
pictures (`sections`, `curves`, `heat`, `drawing`), and all of it one file of HTML (`page`). `make` leads from rows to
files.
"""
