"""A real Slurm on this machine, for as long as a test needs it: two nodes of four cores, and all that it writes in one folder.

- `python tests/slurm.py start FOLDER --gpus 2` prints what the shell has to export;
- `python tests/slurm.py stop FOLDER` ends it, whoever has started it.
"""

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("mungekey", "munged", "slurmctld", "slurmd", "sbatch", "scancel", "sinfo", "squeue")
PACKAGES = "slurm-wlm munge"  # of Debian
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # daemons are not on everybody's path
DAEMONS = {"munged", "slurmctld", "slurmd", "slurmstepd"}
NODES = ("n1", "n2")
LONGEST = 80  # characters of a folder: with a socket's name behind it no more than the 107 of Unix

# proctrack/pgid: when the script of a job ends, Slurm kills what is left in its process group, as the control groups of a real cluster
# do with all that a job has started. With proctrack/linuxproc a worker of Dask lives on beside its successor, for half a minute.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=gpu
PartitionName=tests Nodes={nodes} Default=YES
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=65536{gpus}\n"  # MB: the most that a job may ask for
CGROUPS = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n"  # named, so that nothing looks for those of the machine


def missing():
    """Programs that are not installed."""
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]


def check():
    """Stops where a program is missing, with the packages that have it."""
    if absent := missing():
        raise FileNotFoundError(f"a Slurm for tests needs {', '.join(PROGRAMS)}; not found: {', '.join(absent)}. On Debian: apt-get install {PACKAGES}")


def free_ports(number):
    """Ports of this machine that nobody listens on."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(condition, seconds, what):
    """Waits for a condition; `TimeoutError` with `what` if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


class Slurm:
    """A Slurm whose processes live as long as the `with` block."""

    def __init__(
        self,
        folder,  # for configuration, key, state, logs and sockets; made if it is not there
        gpus=0,  # of each node; they are /dev/null by other names, and bound as real ones are
    ):
        self.folder, self.gpus = Path(folder).resolve(), gpus
        if len(str(self.folder)) > LONGEST or len(str(self.folder).split()) != 1:
            raise ValueError(f"the folder is {str(self.folder)!r}; it needs a path of at most {LONGEST} characters without blanks")
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Both nodes are idle when this returns; if it fails, nothing is left running."""
        check()
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "slurm.conf").exists():
            raise ValueError(f"{self.folder} holds other things than a Slurm; choose a folder that is empty or not there yet")
        if running := self.processes():
            raise RuntimeError(f"a Slurm runs in {self.folder} already, with the processes {running}; stop it, or choose another folder")
        self._write()
        try:
            self._launch()
            until(lambda: self._states() == dict.fromkeys(NODES, "idle"), 60, f"two idle nodes; the logs in {self.folder} say why")
        except BaseException:
            self.stop()
            raise

    def stop(self):
        """Ends every process of this Slurm and of its jobs, and removes their sockets; the rest of the folder stays."""
        for sign, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 20)):
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
            with suppress(TimeoutError):
                until(lambda: not self.processes(), seconds, "an end")
        for path in self.folder.rglob("*"):
            if path.is_socket():
                path.unlink()
        if left := self.processes():
            raise RuntimeError(f"processes of the Slurm in {self.folder} do not end: {left}; end them by hand")

    def call(self, *words):
        """What a command such as `sbatch` prints."""
        command = [shutil.which(words[0], path=PATH), *map(str, words[1:])]
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))} ended with {done.returncode}: {done.stderr.strip() or f'the logs in {self.folder} say why'}")
        return done.stdout.strip()

    def jobs(self):
        """Jobs that wait, run or end: id -> state, such as PENDING."""
        return dict(line.split() for line in self.call("squeue", "--noheader", "--format=%i %T").splitlines())

    def processes(self):
        """Ids of all processes of this Slurm and of its jobs."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._owns(path)]

    def _owns(self, process):
        """Whether a process is a daemon of this folder, or has the environment of one of its jobs."""
        try:
            if (process / "comm").read_text().strip() in DAEMONS:
                return f"{self.folder}/" in (process / "cmdline").read_text() or self.folder == (process / "cwd").readlink()
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or of somebody else
            return False
        return f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environment and any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)

    def _write(self):
        """The configuration, and the folders it names."""
        for folder in ("munge", "state", "cgroup", *NODES):
            shutil.rmtree(self.folder / folder, ignore_errors=True)  # jobs of an earlier start would be taken up again
            (self.folder / folder).mkdir(parents=True)
        host, (port, *ports), user = socket.gethostname().split(".")[0], free_ports(1 + len(NODES)), pwd.getpwuid(os.getuid()).pw_name
        gpus = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = [NODE.format(name=name, host=host, port=port, gpus=gpus) for name, port in zip(NODES, ports, strict=True)]
        common = CONFIGURATION.format(folder=self.folder, host=host, port=port, user=user, nodes=",".join(NODES))
        (self.folder / "slurm.conf").write_text("".join([common, *nodes]))
        (self.folder / "cgroup.conf").write_text(CGROUPS.format(folder=self.folder))
        (self.folder / "gres.conf").write_text("".join(map(self._gpu, range(self.gpus))))

    def _gpu(self, number):
        """A GPU of both nodes: its line in gres.conf, and the device that Slurm demands."""
        device = self.folder / f"gpu{number}"
        device.unlink(missing_ok=True)
        device.symlink_to("/dev/null")
        return f"Name=gpu File={device}\n"

    def _launch(self):
        """The daemons, in the order in which they need each other; each returns when it serves, and goes on behind."""
        munge, configuration = self.folder / "munge", self.environment["SLURM_CONF"]
        self.call("mungekey", "--create", f"--keyfile={munge}/key")
        files = [f"--{kind}{'' if kind == 'socket' else '-file'}={munge}/{kind}" for kind in ("key", "socket", "pid", "log", "seed")]
        self.call("munged", "--force", *files)  # forced: folders above this one may be closed to others
        self.call("slurmctld", "-i", "-f", configuration)
        for name in NODES:
            self.call("slurmd", "-N", name, "-f", configuration)

    def _states(self):
        """Node -> its state, as `sinfo` says; empty as long as nobody answers."""
        try:
            return dict(line.split() for line in self.call("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines())
        except RuntimeError:
            return {}


def main():
    """The command line: start or stop a Slurm in a folder, or check that it could."""
    parser = argparse.ArgumentParser(description="A real Slurm on this machine, with two nodes and all that it writes in one folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start it, and print what the shell has to export")
    start.add_argument("folder")
    start.add_argument("--gpus", type=int, default=0, help="GPUs of each node")
    commands.add_parser("stop", help="end it and its jobs").add_argument("folder")
    commands.add_parser("check", help="say which packages are missing")
    given = parser.parse_args()
    try:
        if given.command == "check":
            check()
        elif given.command == "stop":
            Slurm(given.folder).stop()
        else:
            slurm = Slurm(given.folder, given.gpus)
            slurm.start()
            print(*(f"export {name}={value}" for name, value in slurm.environment.items()), sep="\n")
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
