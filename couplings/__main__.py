"""``python -m couplings``: the same as the `couplings` command."""

from couplings.cli import main

raise SystemExit(main())
