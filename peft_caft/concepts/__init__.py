"""Terms of several tokens: how dense they are, where the loss sits inside them, and reports.

Rule: imports training and what it stands on, never evaluation; only demo and cli import it.
"""
