"""A small Faster and Mask R-CNN on digits pasted on photographs, in six variants: README.md."""
