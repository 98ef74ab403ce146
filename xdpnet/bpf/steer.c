/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Steers the frames of one interface: those for a guest's unicast address go to the AF_XDP socket of the queue that
 * they arrived on, all others go on to the host. XDP cannot clone: group-addressed frames go to the host too, and an
 * AF_PACKET socket picks them up there for the guests.
 *
 * Compiled by bcc with -DXN_QUEUES (sockets) and -DXN_MACS (addresses), and where the kernel says how it lays out its own
 * structs, with what loader.tells() has of that. uapi types only, so that the headers of any kernel will do. Reference: kernel Documentation/networking/af_xdp.rst, "XSKMAP".
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>

struct mac_key {
	__u8 addr[ETH_ALEN];
	__u8 zero[2];
};

/* What their counters are called, too: loader.VERDICTS. */
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

#ifdef XN_TELLS
/* In front of each frame, if it is several in one; gso_type is a virtio_net_hdr's. c/port/netdev_rx.c has the same. */
struct told {
	__u16 gso_size;
	__u8 gso_type;
	__u8 zero[5];
};

enum { GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_UDP_L4 = 5, GSO_OTHER = 255 };

/*
 * In generic mode a frame is an skb's. XDP is not told that it is several in one, but the skb knows: its shared info lies
 * at the end of its buffer (bpf_prog_run_generic_xdp). Where the fields are is the loader's to find out. False: no room.
 */
static __always_inline int tell(struct xdp_md *ctx)
{
	struct told told = {};
	__u64 start = 0;
	__u32 size = 0, type = 0;

	bpf_probe_read_kernel(&start, sizeof(start), (void *)((__u64)ctx + XN_BUFF_START));
	bpf_probe_read_kernel(&size, sizeof(size), (void *)((__u64)ctx + XN_BUFF_SIZE));
	start += size - XN_SHARED_INFO;
	bpf_probe_read_kernel(&told.gso_size, sizeof(told.gso_size), (void *)(start + XN_GSO_SIZE));
	bpf_probe_read_kernel(&type, sizeof(type), (void *)(start + XN_GSO_TYPE));
	if (told.gso_size)
		told.gso_type = type & XN_GSO_OTHERS ? GSO_OTHER
				: type & XN_GSO_TCPV4 ? GSO_TCPV4
				: type & XN_GSO_TCPV6 ? GSO_TCPV6
				: type & XN_GSO_UDP_L4 ? GSO_UDP_L4
							: GSO_OTHER;
	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(told)))
		return 0;
	void *meta = (void *)(long)ctx->data_meta;

	if (meta + sizeof(told) > (void *)(long)ctx->data)
		return 0;
	__builtin_memcpy(meta, &told, sizeof(told));
	return 1;
}
#else
#define tell(ctx) 1
#endif

static __always_inline int decide(struct xdp_md *ctx, int tells)
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
	if (tells && !tell(ctx))
		return XDP_ABORTED;
	/* XDP_PASS here is what the helper returns where this queue has no socket. */
	action = xsks.redirect_map(ctx->rx_queue_index, XDP_PASS);
	return count(action == XDP_REDIRECT ? REDIRECTED : NO_SOCKET, action);
}

int steer(struct xdp_md *ctx)
{
	return decide(ctx, 0);
}

#ifdef XN_TELLS
int steer_and_tell(struct xdp_md *ctx)
{
	return decide(ctx, 1);
}
#endif
