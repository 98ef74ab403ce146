/* Frames of every kind that the core knows, and of some that it does not, as an input says. */
#ifndef FUZZ_PACKETS_H
#define FUZZ_PACKETS_H

#include <linux/virtio_net.h>

#include "input.h"

enum { PACKET_ROOM = 72 * 1024 };

/* Who is there: own address, and those that frames may go to, or come from. */
struct stations {
	const u8 (*mac)[6];
	u32 n;
	u32 self;
};

/*
 * A frame into `to`, which has PACKET_ROOM bytes; its length. *hdr: what is asked for with it, in host order, which is what
 * the packet is fit for unless the input wants it otherwise.
 */
u32 packet_make(struct input *in, const struct stations *at, u8 *to, struct virtio_net_hdr *hdr);

#endif
