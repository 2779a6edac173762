"""The project's promises of speed, measured: `python -m benchmarks --help`.

Machines differ and are noisy, so what is bound is never a time alone but a ratio of two things
measured side by side in one run: in turns (A B A B …), CPU time of the server process rather than
wall time where that will do, medians of several rounds.
"""
