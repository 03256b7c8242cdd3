"""`python -m invariclip` is the command line."""

from invariclip.cli import main

if __name__ == "__main__":
    main()
