"""The command `demo`: the whole path on the bundled images, and a page that shows it."""
