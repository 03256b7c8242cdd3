"""Images to pixels, texts to ids, class names to prompts."""
