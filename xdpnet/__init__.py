"""xdpnet: a vhost-user network backend that moves a guest's virtqueue buffers to and from AF_XDP sockets."""

__version__ = "0.1.0"
