"""The command `demo`: the whole path on the bundled pictures, and a page that shows it."""
