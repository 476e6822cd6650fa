"""Rows to heads to adapter: data, distillation, training of heads (stage 1), fine-tuning (stage 2).

Rule: imports method, heads and basics.
"""
