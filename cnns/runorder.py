"""Makes OneFlow queue a run of a graph before it starts the run, and not after.

OneFlow 0.9.0 (`LaunchLazyJobInstructionPolicy::Compute`) waits until no other graph runs, starts
the run, and then puts the graph into a queue, from which the end of the run takes it out. A run
that is over before it is in the queue takes from an empty one: memory fault, double free or hang.
All it needs is a thread that loses its core between two statements, and nothing that can be called
from outside comes between them; docs/oneflow-notes.md tells more.

So the library's pointers to both functions are led elsewhere (cnns.native): the wait to a few
instructions that wait and then queue, and the queueing behind the start to a return.
"""

import functools

from cnns.log import notice
from cnns.native import address_of, loaded_library, make_function, pointers_to

WAIT = "WaitUntilQueueEmptyIfFrontNNGraphNotEquals"
QUEUE = "EnqueueNNGraph"
RETURN = b"\xc3"


@functools.cache
def queue_before_start() -> bool:
    """Correct the order, once, before the first run of a graph; say so where that is impossible."""
    corrected = exchange()
    if not corrected:
        notice(
            "OneFlow's order of starting and queueing a run could not be corrected on this system; "
            "networks whose steps take few milliseconds may crash."
        )
    return corrected


def exchange() -> bool:
    library = loaded_library()
    if library is None:
        return False
    wait, queue = (address_of(library, method(name)) for name in (WAIT, QUEUE))
    if wait is None or queue is None:
        return False
    places = pointers_to(wait), pointers_to(queue)
    if any(len(pointers) != 1 for pointers in places):
        return False
    try:
        code, _ = make_function(wait_and_queue(wait, queue))
    except OSError:
        return False
    ((to_wait,), (to_queue,)) = places
    to_wait.value, to_queue.value = code + len(RETURN), code
    return True


def method(name: str) -> str:
    """The symbol of a method of `LazyJobStreamPolicy` that takes a graph."""
    argument = "ERKSt10shared_ptrINS_9NNGraphIfEE"
    return f"_ZN7oneflow2vm19LazyJobStreamPolicy{len(name)}{name}{argument}"


def wait_and_queue(wait: int, queue: int) -> bytes:
    """x86-64: a return by itself, and behind it `wait(this, graph); queue(this, graph);`."""
    return b"".join(
        (
            RETURN,
            b"\x57\x56",  # push rdi, rsi
            b"\x48\x83\xec\x08",  # sub rsp, 8: the stack is aligned to 16 bytes at calls
            b"\x48\xb8" + wait.to_bytes(8, "little"),  # mov rax, wait
            b"\xff\xd0",  # call rax
            b"\x48\x83\xc4\x08",  # add rsp, 8
            b"\x5e\x5f",  # pop rsi, rdi
            b"\x48\xb8" + queue.to_bytes(8, "little"),  # mov rax, queue
            b"\xff\xe0",  # jmp rax
        )
    )
