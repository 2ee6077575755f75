"""`python -m longspan.bench.parallel`, which torchrun starts once a rank."""

import sys

from longspan.bench.parallel.run import main

if __name__ == "__main__":
    sys.exit(main())
