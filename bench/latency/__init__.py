"""The command `bench`: candidates timed in turns, one process each, with their answers compared."""
