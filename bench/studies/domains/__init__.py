"""Domain generalisation: what the projection gains on an environment that neither fitting nor selection has seen."""
