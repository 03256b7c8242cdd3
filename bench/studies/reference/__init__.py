"""How the reference model was learnt: pictures with words, ImageNet's classifier, and what joins the two towers."""
