"""`python -m longspan.cli`: the command line where its script is not on the path."""

from longspan.cli import main

main()
