"""What a few unlabelled images of a place are worth, and how the form of a site was chosen."""
