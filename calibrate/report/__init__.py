"""What is said of a calibration: in words, as JSON, and as a page."""
