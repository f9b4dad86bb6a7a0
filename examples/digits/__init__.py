"""Warped handwritten digits, told apart by an ordinary network, by DCNv1 and by DCNv2: README.md."""
