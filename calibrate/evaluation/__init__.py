"""What a projection is compared with, and what is measured beside accuracy."""
