"""Print what becomes of each of transformers' decoders that megabus takes: a row a family, and exit 1 if one is off.

python -m tests.families             # all five: a minute or two
python -m tests.families qwen3       # some of them

Small models of random weights, with their tokenizers, fp32, CPU. Columns:

import, growth   logits from transformers', as imported and as grown by half in width and by a layer
2, 4 ranks       of a run that begins with the model under TP2 (TP2/PP2) and grows into PP2 (PP2/DP2), the worst of: its
                 first loss from transformers', the loss after the growth from that before, its last loss from its
                 export's in transformers
export           logits of the 4 ranks' export in transformers from megabus's
ids              odd texts, of some 300, that the export's tokenizer gives other ids than the original
generate         tokens that are others without a cache, with one, or in megabus

Differences are the largest ones, relative to the largest logit or to the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars

from tests.support.families import FAMILIES, LAYOUTS, LIMIT, begun, compared, trained
from tests.support.small_runs import write_corpus

HEAD = (
    f"{'family':8} {'import':>8} {'growth':>8} {'2 ranks':>8} {'4 ranks':>8} {'export':>8} {'ids':>5} {'generate':>9}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="family", help="all when left out")
    chosen = parser.parse_args().families or list(FAMILIES)
    well = True
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name))
        for family in chosen:
            folder = Path(name) / family
            folder.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):  # what the runs say
                theirs, ours = begun(family, folder)
                runs = [trained(folder, corpus, layouts, ours.config) for layouts in LAYOUTS]
                row = compared(theirs, ours, runs, folder)
            well &= row.is_well
            counts = f"{row.ids or 'equal':>5} {row.tokens or 'equal':>9}"
            print(f"{family:8} {' '.join(f'{error:8.1e}' for error in row.differences)} {counts}", flush=True)
    print(f"every difference at most {LIMIT:g}, all ids equal: {'yes' if well else 'NO'}")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
