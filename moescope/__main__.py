"""`python -m moescope` is the command line."""

from moescope.cli import main

main()
