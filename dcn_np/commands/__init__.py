"""What `python -m dcn_np` can do: one module per command.

Each command module has `add_arguments(parser)` and `main(args) -> int`, the exit status. Its imports at
module level are light; what only one command needs is imported when that command runs.
"""
