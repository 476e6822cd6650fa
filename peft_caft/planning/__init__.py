"""What training would cost, computed from a model's configuration alone.

Rule: imports method, heads and basics; never training or hub.
"""
