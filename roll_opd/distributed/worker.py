"""One process of one role. Roles' workers (:mod:`roll_opd.pipeline.workers`) derive from it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
from datetime import timedelta
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from roll_opd.distributed.process_spec import ProcessSpec
from roll_opd.utils.logging import configure_logging, log_file_path

logger = logging.getLogger(__name__)

SIOCGIFADDR = 0x8915
"""Linux's number for the question which IPv4 address an interface has."""


class Worker:
    """Sets the process up; a subclass loads its model in ``setup``, where errors reach the driver as themselves."""

    def __init__(self, spec: ProcessSpec) -> None:
        if spec.gpu_ids:
            # CUDA reads this when it is first used, which is after this line. Where the node itself was given a part of
            # its GPUs, ours are counted within that part.
            given = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given[i] if given else str(i) for i in spec.gpu_ids)
        # Gloo otherwise takes whatever address the host's name stands for, which other nodes often cannot reach.
        interface = _interface_of(ray.util.get_node_ip_address())
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.device = torch.device("cuda:0" if spec.gpu_ids else "cpu")
        configure_logging(log_file=log_file_path(Path(spec.log_dir), spec.name), process=spec.name)
        logger.info("process %d on %s with %d thread(s)", os.getpid(), self.device, spec.threads)

    def open_rendezvous(self) -> tuple[str, int]:
        """Start the key-value store through which the role's ranks find each other; rank 0 only."""
        self._store = open_store(self.spec.world_size)
        return self._store.host, self._store.port

    def join(self, host: str, port: int, timeout_minutes: float) -> None:
        """Form the role's process group; all ranks."""
        if self.spec.rank:
            self._store = dist.TCPStore(host, port, self.spec.world_size, is_master=False)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=self._store,
            rank=self.spec.rank,
            world_size=self.spec.world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )


def open_store(clients: int) -> dist.TCPStore:
    """Start a key-value store on this node's address, through which as many processes can find each other.

    The system chooses the port, so two runs on one machine never collide.
    """
    host = ray.util.get_node_ip_address()
    # A socket of ours, because the store would listen on every interface.
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(clients)
    port = int(listener.getsockname()[1])
    return dist.TCPStore(
        host, port, clients, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _interface_of(address: str) -> str | None:
    """Name of the network interface that has the IPv4 ``address``; None: none of them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
