"""Loops in the form of trainers that people use, small enough to run in a test.

Each has a function ``run`` that trains for a few steps and yields, for each, the data, the noise that was mixed into it
as the network saw it, and the noise in the target. Pages in docs/loops change lines of them.
"""
