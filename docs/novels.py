"""Write Jane Austen's six novels (public domain) to one text file, for the tables of accuracy.md.

They come from Debian's package r-cran-janeaustenr, fetched with apt and unpacked with dpkg: run
this on Debian or Ubuntu. Any other long English prose serves as well; the hash of what was used is
recorded with every result.

  python docs/novels.py novels.txt
"""

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def chunks(data: bytes) -> list[bytes]:
  """Unpack R's lazy-load database: an uncompressed length, then a zlib stream, back to back."""
  out, at = [], 0
  while at < len(data):
    size = struct.unpack_from(">i", data, at)[0]
    unpack = zlib.decompressobj()
    out.append(unpack.decompress(data[at + 4 :]))
    if len(out[-1]) != size:
      raise SystemExit(f"novels: expected a chunk of {size} bytes, got {len(out[-1])}")
    at = len(data) - len(unpack.unused_data)
  return out


def strings(chunk: bytes) -> list[str]:
  """The elements of a serialised R character vector (XDR format, version 2 or 3)."""
  version = struct.unpack_from(">i", chunk, 2)[0]
  at = 14
  if version == 3:
    at += 4 + struct.unpack_from(">i", chunk, at)[0]
  flags, count = struct.unpack_from(">ii", chunk, at)
  if flags & 0xFF != 16:
    return []
  at, out = at + 8, []
  for _ in range(count):
    _, size = struct.unpack_from(">ii", chunk, at)
    at += 8
    out.append(chunk[at : at + max(size, 0)].decode("latin-1" if size < 0 else "utf-8"))
    at += max(size, 0)
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("out", type=Path, help="text file to write")
  out = parser.parse_args().out
  with tempfile.TemporaryDirectory() as folder:
    try:
      subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
      (deb,) = Path(folder).glob("*.deb")
      subprocess.run(["dpkg-deb", "-x", deb, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, ValueError) as e:
      print(f"novels: could not fetch Debian's {PACKAGE} with apt-get: {e}", file=sys.stderr)
      raise SystemExit(2) from None
    novels = [strings(c) for c in chunks((Path(folder) / DATA).read_bytes())]
  text = "\n\n".join("\n".join(lines) for lines in novels if lines)
  temporary = out.with_suffix(".part")
  temporary.write_text(text)
  temporary.replace(out)
  print(f"{out}: {len(text)} characters of {sum(map(bool, novels))} novels")


if __name__ == "__main__":
  main()
