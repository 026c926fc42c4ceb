"""The flags of the binaries that several processes may run together: each is started once by every process of the job."""

from absl import flags

from flowjax.train import runtime

COORDINATOR = flags.DEFINE_string("coordinator", "", 'Several processes: host:port of process 0, or "auto".')
PROCESSES = flags.DEFINE_integer("processes", 0, "Several processes: how many.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several processes: which one this is.")
HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "Several processes: seconds of silence after which one counts as dead.")


def join():
    """runtime.setup as the flags, or the environment, say."""
    runtime.setup(*runtime.job(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value), HEARTBEAT.value)
