"""What a command's exit code says."""

from __future__ import annotations

# As fast as before, or faster, and right.
GOOD = 0
# Slower, heavier or less exact beyond the limit, or a wrong result.
WORSE = 1
# Arguments or files that cannot be understood.
USAGE = 2
# Nothing can be said: too noisy, or nothing to compare with. What ran is right.
UNDECIDED = 3
# What is watched raised, or the tool itself did.
CRASHED = 4
# Ctrl-C, as shells say it of a process.
INTERRUPTED = 130
