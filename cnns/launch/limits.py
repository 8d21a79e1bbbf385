"""How long everything may take when processes are started, watched and ended, in seconds."""

TICK_SECONDS = 0.1
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0  # a node not heard from for so long is lost
HELLO_SECONDS = 5.0  # a connection that has not said by then who it is gets closed
RANK_0_SECONDS = 120.0  # for rank 0 to import OneFlow, before the others do so anyway
TELL_SECONDS = 10.0  # node 0 stays so long to tell nodes that are still to come why it ended
GATHER_SECONDS = (
    1.5  # after a death: others may turn out to have died first, or for a better reason
)
TERM_SECONDS = 1.5  # between SIGTERM and SIGKILL
REAP_SECONDS = 5.0  # for processes to be gone after SIGKILL, and other nodes to say so
HOLD_SECONDS = 5.0  # a line that may belong to a crash waits so long to see whether one follows
STOP_SECONDS = 300.0  # for workers to finish after SIGINT or SIGTERM; saving takes a while
SAME_SIGNAL_SECONDS = 1.0  # `timeout` and schedulers send a signal to the process and to its group
