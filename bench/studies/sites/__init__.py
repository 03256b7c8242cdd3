"""What a few unlabelled pictures of a place are worth, and how the form of a site was chosen."""
