"""Auxiliary heads and what they stand on: the base model's last layer, norm and unembedding; their
files, card and repository.

Rule: imports basics.
"""
