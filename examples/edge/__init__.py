"""A trained network at work on frames, with NumPy and dcn_np alone: README.md."""
