"""Train DMT-JEPA on a SLURM cluster, as a job that requeues itself:

    python main_distributed.py --fname configs/in1k_vith14_ep300.yaml --folder $LOGS --partition gpu \\
        --nodes 2 --tasks-per-node 8 --time 4300

The command `dmtjepa submit` does the same.
"""

import sys

from dmtjepa.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())
