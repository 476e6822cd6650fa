"""Tasks, answers, scores, and comparisons of arms.

Rule: imports training, planning, hub and what they stand on; only demo and cli import it.
"""
