"""The projection: moments, estimators, and how one of its candidates is chosen."""
