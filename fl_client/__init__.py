"""The hospital: holds images, keys and policy, and may refuse."""
