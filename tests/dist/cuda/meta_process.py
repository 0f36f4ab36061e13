"""A process whose platform is cuda, without a GPU; see meta_device."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path


def _serve(folder: Path) -> None:
    os.environ |= {"MEGARL_PLATFORM": "cuda", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    from megarl.parallel.environment import apply_environment

    apply_environment()
    import torch

    from tests.dist.cuda.meta_device import say_there_is_a_gpu

    torch.set_num_threads(1)
    say_there_is_a_gpu()
    from megarl.parallel.platform import install_platform

    assert install_platform().name == "cuda"
    calls = pickle.loads((folder / "calls.pickle").read_bytes())
    answers = {name: call() for name, call in calls.items()}
    (folder / "answers.pickle").write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
