"""`python -m gridsession.tools`."""

from gridsession.tools import main

main()
