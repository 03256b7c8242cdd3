"""The command line: one file for each command of the runtime, and the group that finds all of them."""
