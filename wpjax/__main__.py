"""`python -m wpjax`."""

from wpjax.cli import main

main()
