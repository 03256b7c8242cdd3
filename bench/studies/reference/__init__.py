"""How the reference model was learnt: images with words, ImageNet's classifier, and what joins the two towers."""
