"""The whole way on a real model and real molecules, on a CPU.

Rule: imports any room but cli.
"""
