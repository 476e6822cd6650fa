"""What comes from or goes elsewhere: inspect, publish, import, merge, the embedded model.

Rule: imports method, heads and basics; never training.
"""
