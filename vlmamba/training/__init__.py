"""Training: `run` narrates the set-up, `loop` is the loop; everything else is a part that one of them
calls.
"""
