"""`python -m invariclip` is the command line."""

from invariclip.cli.main import main

if __name__ == "__main__":
    main()
