"""Sources of pairs of any size, one kind a module; `config` reads the list of them."""
