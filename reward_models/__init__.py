"""Reward models of one's own: heads, losses, data, training and serving.

This package may import `align.training`, never `align.loop`: a reward model is made before a run and enters it as a
checkpoint, through a verifier of kind `reward_model` (`align.verifiers.reward_model` scores with it).
"""
