"""Train DMT-JEPA on this machine: `python main.py --fname configs/quickstart.yaml --devices cuda:0 cuda:1`.

One process per device is started, or this is one of torchrun's processes: `torchrun --nproc-per-node 8 main.py ...`.
The command `dmtjepa train` does the same.
"""

import sys

from dmtjepa.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
