"""Measuring steps: named models, peers, timing in turns, and what is made of the results."""
