"""Stylebench: one set of concepts drawn in several styles, from openly licensed packages."""
