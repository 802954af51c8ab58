"""A Slurm of three nodes on one machine: ``with Cluster(folder) as cluster: cluster.run("sinfo")``.

A node is a network, mount, host-name and process namespace with Debian's slurmd of its own, on a bridge with the
others; the first one runs slurmctld too. Namespaces and overlays need root; nothing outlives the block, and nothing of
the machine is changed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from components.artifacts import die_with_parent
from tests.cluster.packages import NoSlurmError, fetch
from tests.waiting import CEILING_S, wait_for

NODES = ("n1", "n2", "n3")
SWITCH = "switch"

_SLURM_CONF = """\
ClusterName=train
SlurmctldHost=n1
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool-%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd-%n.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1,requeue_delay=1
AuthInfo=cred_expire=5
ReturnToService=2
SlurmdTimeout={silence_s}
SlurmctldTimeout={silence_s}
KillWait={kill_wait_s}
MinJobAge=86400
GresTypes=gpu
NodeName=n[1-3] CPUs=64 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=20000 Gres=gpu:8
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_NODE = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t overlay overlay -o lowerdir={slurm}/usr:/usr /usr
mount -t overlay overlay -o lowerdir={work}/etc:{slurm}/etc:/etc /etc
mount -t tmpfs none /sys/fs/cgroup
hostname {name}
ip link set lo up
export LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/slurm-wlm
{controller}
slurmd -D -N {name} &
wait
"""


def why_not() -> str:
    """What this machine lacks for a cluster; empty when nothing."""
    if os.geteuid() != 0:
        return "namespaces and overlays need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not here"
    try:
        slurm = fetch()
    except NoSlurmError as error:
        return f"no Slurm: {error}"
    probe = f"mount -t overlay overlay -o lowerdir={slurm}/usr:/usr /usr && slurmd -V"
    tried = subprocess.run(
        ["unshare", "-m", "-u", "-n", "-p", "--fork", "bash", "-c", probe], capture_output=True, text=True
    )
    return (
        f"namespaces or overlays do not work here: {tried.stderr.strip()[-200:]}" if tried.returncode else ""
    )


class Cluster:
    """Three nodes, up within the block.

    Args:
        folder: for state and logs; the nodes see the machine's files where they are.
        silence_s: Slurm's ``SlurmdTimeout``: after how long a node that does not answer is given up.
        kill_wait_s: Slurm's ``KillWait``: from SIGTERM to SIGKILL of what is cancelled.
    """

    def __init__(self, folder: Path, silence_s: int = 60, kill_wait_s: int = 30) -> None:
        self.folder, self._limits = folder, {"silence_s": silence_s, "kill_wait_s": kill_wait_s}
        self._prefix = f"st{os.getpid()}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    # ---------------------------------------------------------------- up and down

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _ip(self, *arguments: str, within: str | None = None) -> None:
        inside = ["ip", "netns", "exec", self._namespace(within)] if within else []
        subprocess.run([*inside, "ip", *arguments], check=True, capture_output=True)

    def __enter__(self) -> Cluster:
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._down()

    def _up(self) -> None:
        etc = self.folder / "etc"
        (etc / "slurm").mkdir(parents=True)
        (self.folder / "state").mkdir()
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (etc / "slurm" / "slurm.conf").write_text(_SLURM_CONF.format(work=self.folder, **self._limits))
        (etc / "slurm" / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={self.folder}/gpu[0-7]\n")
        (etc / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(NODES, 1))
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no name server
        self._ip("netns", "add", self._namespace(SWITCH))
        self._ip("link", "add", "br0", "type", "bridge", within=SWITCH)
        self._ip("link", "set", "br0", "up", within=SWITCH)
        for name in NODES:
            self.start(name)
        self.await_idle()

    def start(self, name: str) -> None:
        """Plug a node in and start its daemons."""
        number, space = NODES.index(name) + 1, self._namespace(name)
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._ip("netns", "add", space)
        ends = ["link", "add", f"v{number}", "netns", self._namespace(SWITCH), "type", "veth"]
        self._ip(*ends, "peer", "name", "eth0", "netns", space)
        self._ip("link", "set", f"v{number}", "master", "br0", "up", within=SWITCH)
        self._ip("addr", "add", f"10.77.0.{number}/24", "dev", "eth0", within=name)
        self._ip("link", "set", "eth0", "up", within=name)
        script = self.folder / f"{name}.sh"
        script.write_text(
            _NODE.format(
                slurm=fetch(), work=self.folder, name=name, controller="slurmctld -D &" if number == 1 else ""
            )
        )
        with (self.folder / f"{name}.out").open("ab") as log:
            self._nodes[name] = subprocess.Popen(
                [
                    *("ip", "netns", "exec", space, "unshare", "-m", "-u", "-p", "--fork", "--kill-child"),
                    *("bash", str(script)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _down(self) -> None:
        for name in list(self._nodes):
            self._end(name)
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            if line.split()[0].startswith(f"{self._prefix}-"):
                subprocess.run(["ip", "netns", "del", line.split()[0]], capture_output=True)

    def _end(self, name: str) -> None:
        """Kill everything in a node: its first process takes the whole process namespace along."""
        node = self._nodes.pop(name)
        for child in _children(node.pid):
            os.kill(child, signal.SIGKILL)
        node.kill()
        node.wait()

    def cut(self, name: str, plugged: str = "down") -> None:
        """Pull the node's network cable; its processes go on. ``"up"`` plugs it in again."""
        self._ip("link", "set", f"v{NODES.index(name) + 1}", plugged, within=SWITCH)

    def lose(self, name: str) -> None:
        """Cut the node off, then kill all that runs on it: nobody hears of its end."""
        self.cut(name)
        self._end(name)
        self._ip("netns", "del", self._namespace(name))

    # ---------------------------------------------------------------- use

    def await_idle(self) -> None:
        """Return when all nodes are free."""
        wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "3", "three idle nodes")

    def run(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """Run a command on the first node; its output."""
        first = _children(self._nodes["n1"].pid)
        if not first:
            return ""
        enter = ["nsenter", f"--target={first[0]}", "--mount", "--uts", "--net", "--pid"]
        libraries = "LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/slurm-wlm"
        done = subprocess.run(
            [*enter, "--wdns=" + str(cwd or self.folder), "env", libraries, *command],
            env={**(environment or os.environ)},
            capture_output=True,
            text=True,
            timeout=CEILING_S,
        )
        if done.returncode and command[0] != "sinfo":
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        text = self.run("scontrol", "show", "job", number, "-o")
        return dict(re.findall(r"(\w+(?:/\w+)*)=(\S*)", text))

    def processes(self, name: str, module: str) -> list[int]:
        """Processes on a node that run a Python module as their first, by the machine's numbers."""
        space = Path(f"/proc/{_children(self._nodes[name].pid)[0]}/ns/uts").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "ns" / "uts").readlink() == space:
                    line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if "-m" in line and line[line.index("-m") + 1] == module:
                        found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]
