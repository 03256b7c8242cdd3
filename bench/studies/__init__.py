"""How the committed tables were made. Not part of the wheel."""
