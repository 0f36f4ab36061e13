"""Who starts a run's engines in processes of their own. Imports neither Ray nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megarl.launchers.host_address import ENGINE_HOSTS
from megarl.launchers.ray_address import named_cluster
from megarl.launchers.starter import placed_rank
from megarl.plan.engine_place import EnginePlacer


def are_placed_by_ray(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether processes are placed on the nodes of a cluster that was named."""
    return placed_rank(environ) is None and named_cluster(environ) is not None


def engine_placer(environ: Mapping[str, str] = os.environ) -> EnginePlacer:
    """Return who starts the engines of a run with these variables, of which a check says whether they go together."""
    if are_placed_by_ray(environ):
        return EnginePlacer.RAY
    return EnginePlacer.HOSTS if environ.get(ENGINE_HOSTS) else EnginePlacer.COMMAND
