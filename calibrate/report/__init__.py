"""What is reported of a calibration and of learned prompts: in words, as JSON, and as HTML pages."""
