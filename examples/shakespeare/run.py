"""Prepare and run the Shakespeare study, and print its summary.

    FEDCANARY_DATA=DIR python examples/shakespeare/run.py [--out runs/shakespeare] [--set KEY=VALUE ...]

Ends with 0 when the study has run, whatever it found: finding something is what it is for. `fedcanary run` itself
would say 3 for an alarm. A run that is already in runs/shakespeare is replaced; one in a folder you name is not.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from pathlib import Path

import prepare

from fedcanary import cli
from fedcanary.errors import EXIT_ALARM, EXIT_OK, FedcanaryError
from fedcanary.record import NAME

STUDY = Path(__file__).with_name("study.toml")
OUT = prepare.ROOT / "runs" / "shakespeare"


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare and run the Shakespeare study.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        facts = prepare.prepare()
    except FedcanaryError as error:
        print(f"shakespeare: {error}", file=sys.stderr)
        return error.exit_code
    for name in ("rows", "speakers", "speakers_who_can_be_clients", "public_rows", "base_loss_per_token"):
        print(f"{name}: {facts[name]}")
    prepared = time.monotonic()
    if arguments.out == OUT and (OUT / NAME).is_file():
        shutil.rmtree(OUT)
    changes = [word for change in arguments.set for word in ("--set", change)]
    code = cli.main(["run", str(STUDY), "--out", str(arguments.out), *changes])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"took {prepared - began:.0f} s to prepare and {time.monotonic() - prepared:.0f} s to run; "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor time, {used.ru_maxrss / 1024:.0f} MB at most",
        file=sys.stderr,
    )
    return EXIT_OK if code == EXIT_ALARM else code


if __name__ == "__main__":
    sys.exit(main())
