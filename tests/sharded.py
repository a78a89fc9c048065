"""`python -m tests.sharded ...`: ztrain.train where accelerate takes CPUs for GPUs whose processes may share a model.

accelerate hands FSDP2 out on GPUs only; torch's fully_shard itself runs on gloo. So what FSDP2 does to our forward,
checkpoints and exports is tested without a GPU. To be started by torchrun with ACCELERATE_USE_FSDP and the like set.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from ztrain.train.loop import main

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.exit(main())
