"""``python -m saltire`` is the ``saltire`` command."""

from saltire.cli import main

main()
