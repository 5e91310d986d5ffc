"""Token files of URLs come to all ranks of a machine before anything is opened."""

from __future__ import annotations

import time

import numpy as np
import torch.distributed as dist

from megabus.data import sources
from megabus.errors import UserError
from megabus.preflight import files
from megabus.testing.ranks import run_ranks
from tests.support.object_store import object_store
from tests.support.small_runs import run_config, write_tokens


def _fetch(config, late):
    """Whether the files are there, and how often this rank has shown that it lives."""
    beats, rank, fetch = [], dist.get_rank(), sources.fetch

    def slowly(config):
        if rank == late:
            time.sleep(2.5)
        fetch(config)

    files.fetch = slowly
    try:
        files.fetch_together(config, dist.distributed_c10d._get_default_group(), lambda: beats.append(1))
    except UserError as error:
        return str(error), len(beats)
    return None, len(beats)


def test_who_has_its_files_waits_and_lives(tmp_path):
    (tmp_path / "store").mkdir()
    for name in ("train", "valid"):
        write_tokens(tmp_path / "store" / name, np.arange(500) % 60)
    with object_store(tmp_path / "store") as (url, handler):
        data = {"train": f"{url}/train", "valid": f"{url}/valid", "cache": str(tmp_path / "cache")}
        config = run_config(tmp_path, tmp_path / "run", [{}] * 3, data=data)
        first, second = run_ranks(2, _fetch, config, 1)
        assert first[0] is second[0] is None
        assert first[1] == second[1] >= 3
        assert [path for path, _ in handler.asked].count("/train.bin") == 1
        (tmp_path / "store/valid.bin").unlink()
        missing = config.model_copy(update={"data": config.data.model_copy(update={"cache": str(tmp_path / "other")})})
        told = run_ranks(2, _fetch, missing, None)
        assert told[0][0] == told[1][0]
        assert told[0][0].startswith(f"data.valid = {url}/valid.bin: is not there")
