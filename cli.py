"""The same as the command `speedrl`, without installing it."""

from speedrl.__main__ import main

main()
