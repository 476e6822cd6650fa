"""What several rooms use: checks, settings, files, run folders, records, intervals, tables, plots.

Rule: imports nothing of the package, and no module here is used by one room alone.
"""
