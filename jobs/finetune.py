"""Fine-tune a base model into a registered S2FT adapter: what ``ray job submit`` runs."""

import sys

from s2ft_ray.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
