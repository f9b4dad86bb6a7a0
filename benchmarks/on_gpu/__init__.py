"""The parts of gpu.py: what is timed, on which device, by whom, and what is to be reached.

gates ─► problems        numbers in, verdicts out: no other library
timing ─► layers, inputs, devices, problems
"""
