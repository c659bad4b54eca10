"""A C++ compiler that does not optimise, and caches its object files in a folder.

    python quick_compiler.py FOLDER COMPILER ARGUMENTS...

The key of the cache is the preprocessed source and the flags: a header that an install lacks is still an error, and the
path of the source does not matter.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path, compiler: str, arguments: list[str]) -> int:
    command = [compiler, *arguments, "-O0", "-g0"]
    if "-c" not in arguments or "-o" not in arguments:
        os.execvp(compiler, command)
    target = Path(arguments[arguments.index("-o") + 1])
    named_in_makefile = ["-MT", str(target)] if "-MMD" in arguments else []
    preprocessed = subprocess.run([*command, "-E", "-P", *named_in_makefile])
    if preprocessed.returncode != 0:
        return preprocessed.returncode
    flags = [flag for flag in arguments if flag.startswith(("-f", "-m", "-std")) and "=/" not in flag]
    named = hashlib.sha256(" ".join(flags).encode() + target.read_bytes()).hexdigest()
    kept = folder / f"{named}.o"
    if kept.exists():
        shutil.copyfile(kept, target)
        return 0
    done = subprocess.run(command)
    if done.returncode == 0:
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, unfinished)
        unfinished.replace(kept)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
