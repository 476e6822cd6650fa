"""What comes from elsewhere and goes elsewhere: inspect, publish, import, merge, the embedded
model.

Rule: imports method, heads and basics; never training.
"""
