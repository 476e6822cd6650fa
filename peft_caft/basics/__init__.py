"""What every room uses and none owns: checked values, whole files, run folders, records, intervals,
tables, plots.

Rule: imports nothing of the package, and no module here is used by one room alone.
"""
