"""What a projection is fitted on: images, their changed versions, embeddings, pairs, and the moments of those."""
