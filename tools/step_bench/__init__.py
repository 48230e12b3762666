"""The parts of bench_step.py: the job, and the sides that do it."""
