"""Coverage-guided fuzzing of everything that compress reads from somebody else: ``python -m fuzz``.

See docs/fuzzing.md. The same targets run in the tests, driven by Hypothesis (tests/test_fuzz.py).
"""
