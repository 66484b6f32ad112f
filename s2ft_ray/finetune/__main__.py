"""``python -m s2ft_ray.finetune``: what the scheduler starts."""

import sys

from s2ft_ray.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
