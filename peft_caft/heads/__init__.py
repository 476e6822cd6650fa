"""Auxiliary heads, the parts of the base model that they use, their files, card and repository.

Rule: imports basics.
"""
