/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Steers the frames of one interface: those for a guest's unicast address go to the AF_XDP socket of the queue that
 * they arrived on, all others go on to the host. XDP cannot clone: group-addressed frames go to the host too, and an
 * AF_PACKET socket picks them up there for the guests.
 *
 * Compiled by bcc with -DXN_QUEUES (sockets) and -DXN_MACS (addresses). uapi types only, so that the headers of any
 * kernel will do. Reference: kernel Documentation/networking/af_xdp.rst, "XSKMAP".
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>

struct mac_key {
	__u8 addr[ETH_ALEN];
	__u8 zero[2];
};

/* loader.VERDICTS has the same names in the same order. */
enum verdict { REDIRECTED, NO_SOCKET, GROUP, HOST, RUNT, VERDICTS };

BPF_XSKMAP(xsks, XN_QUEUES);
BPF_HASH(macs, struct mac_key, __u32, XN_MACS);
BPF_PERCPU_ARRAY(verdicts, __u64, VERDICTS);

static __always_inline int count(int verdict, int action)
{
	__u64 *counter = verdicts.lookup(&verdict);

	if (counter)
		(*counter)++;
	return action;
}

int steer(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct mac_key key = {};
	int action;

	if (data + sizeof(*eth) > data_end)
		return count(RUNT, XDP_PASS);
	if (eth->h_dest[0] & 1)
		return count(GROUP, XDP_PASS);
	__builtin_memcpy(key.addr, eth->h_dest, ETH_ALEN);
	if (!macs.lookup(&key))
		return count(HOST, XDP_PASS);
	/* XDP_PASS here is what the helper returns where this queue has no socket. */
	action = xsks.redirect_map(ctx->rx_queue_index, XDP_PASS);
	return count(action == XDP_REDIRECT ? REDIRECTED : NO_SOCKET, action);
}
