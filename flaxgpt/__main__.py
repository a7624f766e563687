import sys

from flaxgpt.cli import main

sys.exit(main())
