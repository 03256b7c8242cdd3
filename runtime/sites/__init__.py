"""Sites: a camera, shop or style whose shift is measured on unlabelled images (docs/sites.md)."""
