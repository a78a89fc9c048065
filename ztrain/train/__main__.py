"""`accelerate launch -m ztrain.train --config FILE ...`."""

import sys

from ztrain.train.loop import main

if __name__ == "__main__":
    sys.exit(main())
