"""CAFT as a PEFT method: configuration, losses, objective, tuner, full fine-tuning, callback.

Rule: imports heads and basics. The public names of ``peft_caft`` live in these three rooms.
"""
