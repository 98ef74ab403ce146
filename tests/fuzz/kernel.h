/*
 * The kernel's side of AF_XDP, in this process: what the core asks of the kernel for a socket ends here, and the four rings
 * lie in plain memory, so that a target decides when a frame arrives, is sent, and is given back.
 */
#ifndef FUZZ_KERNEL_H
#define FUZZ_KERNEL_H

#include <linux/virtio_net.h>

#include "input.h"

/* What the sockets that are opened from now on are like, and how they answer. */
struct kernel {
	bool zerocopy; /* the driver's */
	bool metadata; /* UMEMs may have room for it (Linux 6.11) */
	bool holds;    /* what is sent is not given back before kernel_complete */
	int error;     /* of sendto; 0: none */
	u32 budget;    /* descriptors that one sendto takes */
	u64 sent;      /* descriptors */
};
extern struct kernel kernel;

/* As it is at first. */
void kernel_reset(void);
/* A frame for the socket, in as many buffers as it takes; `wrong`: what is to be wrong with the descriptors, 0: nothing. */
void kernel_receive(int fd, const u8 *frame, u32 len, u8 wrong, u64 value);
/* A frame for an AF_PACKET socket, with its tag beside it if it has one. */
void kernel_receive_group(const struct virtio_net_hdr *told, const u8 *frame, u32 len, u32 tag);
/* Sends what is in the tx ring, and gives back up to `most` of what was held. */
void kernel_complete(int fd, u32 most);
/* Descriptors of the socket that the core is waiting for. */
u32 kernel_outstanding(int fd);
/* Whether the bytes are in a file that was mapped: guest memory. */
bool kernel_is_guest(const void *p);
void kernel_guard(const u8 *from, u64 n, bool poison);

#endif
