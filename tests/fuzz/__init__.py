"""Fuzzers of every file and text that people give us: `make fuzz`, and the page docs/fuzzing.md.

An input is made from its family's name and its number alone, so that a finding is repeated by
`cd tests && python -m fuzz FAMILY --only NUMBER`, and a run that was stopped goes on where it was.
"""
