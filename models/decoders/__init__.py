"""Decoders: the tokens of one block -> predictions for its masked tokens.

A decoder is private to its block and is dropped after pretraining, except its first norm, which becomes the final norm of
the exported depth variant.
"""
