"""``python -m s2ft_ray.cli``: the command where no script directory is on PATH."""

import sys

from s2ft_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
