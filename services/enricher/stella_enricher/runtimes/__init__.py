"""Container runtimes, asked over their sockets: which image a container runs, and who watches over it.

facts        what an answer holds, and the Protocol that every runtime keeps (pure)
protobuf     a strict reader of protobuf (pure)
sockets      one UNIX socket, bounded in time and size: HTTP/1.1 and gRPC; the only module that opens one
docker       Docker Engine API: Docker, and podman's compatible socket
containerd   containerd's own gRPC: nerdctl, ctr
cri          the Container Runtime Interface: Kubernetes on containerd and CRI-O
contact      a runtime that may be away: counts, reasons, back-off, its stream of events
finding      which sockets there are
asking       questions, answers, memory
"""
