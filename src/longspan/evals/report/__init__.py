"""Reports of evals: journals of any eval become tables with intervals, pictures and one page.

Rows become samples (`samples`), samples groups with intervals (`statistics`, `scores`), groups a table and pictures
(`pictures`), and all of it one file of HTML (`page`). `make` does it from journals to files.
"""
