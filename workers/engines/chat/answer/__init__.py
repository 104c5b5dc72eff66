"""What the text of an answer consists of: reasoning, content, calls of tools.

`format.py` finds out at load how the model writes them, from its chat template. `parser.py` divides the text
of one choice as it arrives.
"""
