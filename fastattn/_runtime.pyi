# What config.py reads and sets.
selected: str
runnable: list[str]
cpu_features: list[str]
kernel_names: dict[str, str]
openmp_version: int
own_threads: bool

def get_threads() -> int: ...
def set_threads(num_threads: int) -> None: ...

# In a debug build only.
def fail_allocation(n: int) -> int: ...
def live_allocations() -> int: ...
