"""What processes of this machine hold, and whether Linux has ended one of them for want of memory."""

from pathlib import Path

_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")  # cgroups 2 and 1, the machine
ADVICE = "run fewer at a time, give them more memory, or set a smaller micro_batch (the global batch stays)"


def kills() -> int:
    """A number that has grown once Linux has ended a process, here or in this container, for want of memory; 0 where nothing tells."""
    return sum(_count(Path(path)) for path in _COUNTERS)


def _count(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def why_killed(before: int, gib: float = 0.0) -> str:
    """Of a process that ended by SIGKILL, holding `gib` (0: not known): who did it, by the counter now and `before`, and what to do."""
    held = f", when it held {gib:.1f} GiB" if gib else ""
    if kills() > before:
        return f"ended by Linux for want of memory{held}: {ADVICE}"
    return f"killed (SIGKILL{held}); if it was for want of memory: {ADVICE}"


def name_of_kernels(run: int) -> str:
    """What the system calls the kernels forked for the process `run`: they are the server's children, not its own."""
    return f"lab {run}"


def held_gib(run: int) -> float:
    """What the process `run`, all that it started and the kernels forked for it hold, with shared pages (libraries) counted once."""
    import psutil

    found = {process.pid: process.info for process in psutil.process_iter(["ppid", "name", "memory_info"])}
    own = {pid for pid, info in found.items() if pid == run or info["name"] == name_of_kernels(run)}
    while more := {pid for pid, info in found.items() if info["ppid"] in own} - own:
        own |= more
    held = [found[pid]["memory_info"] for pid in own if found[pid]["memory_info"]]
    shared = [getattr(memory, "shared", 0) for memory in held]
    return (sum(memory.rss for memory in held) - sum(shared) + max(shared, default=0)) / 2**30
