/*
 * Frames from the wire: the receive rings of AF_XDP sockets, and the AF_PACKET socket's group-addressed frames.
 */
#define _GNU_SOURCE
#include <linux/if_packet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "frame/packet.h"
#include "frame/partial.h"
#include "frame/vnet.h"
#include "netdev.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4 /* Linux 6.2 */
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

enum {
	/* Room before a group frame, for the VLAN tag that the kernel took off. */
	VLAN_TAG = 4,
	/* The rest of a chain comes at once, or never. */
	UNFINISHED_US = 1000000,
	BAD_FRAMES = 3
};

/* In front of a frame, where the XDP program tells what is several in one: xdpnet/bpf/steer.c has the same. */
struct told {
	u16 gso_size;
	u8 gso_type; /* of a virtio_net_hdr, or one that is none */
	u8 zero[5];
};

/* The view of a frame in memory of ours. A virtual interface may have left its checksum partial. */
static always_inline void open_frame(struct view *v, const struct piece *pieces, u32 n, u32 len)
{
	v->pieces = pieces;
	v->n = n;
	v->len = len;
	v->port = VIEW_FLOOD;
	v->needs = 0;
	v->vnet = (struct virtio_net_hdr){0};
	if (unlikely(len < ETH_HLEN)) {
		view_drop(v, XN_DROP_RUNT);
		return;
	}
	partial_find(v);
	view_snapshot(v);
}

/* Drivers with zero copy may ask to be told of new fill entries. */
static void wake_driver(const struct xsk *x)
{
	if (__atomic_load_n(x->fill.flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP)
		(void)recvfrom(x->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

/* Entries behind those that are consumed; i-th of them. */
static const struct xdp_desc *received(const struct xsk *x, u32 i)
{
	return xsk_desc_at(&x->rx, x->rx.cached_consumer + i);
}

/* Whether a descriptor is one of a receive frame of this socket, and says nothing that we do not know. */
static bool is_ours(const struct xsk *x, const struct xdp_desc *d)
{
	u64 in_set = xsk_place(d->addr) - x->first;

	return in_set < x->arena->set_size / 2 && d->len <= XN_FRAME_SIZE - in_set % XN_FRAME_SIZE &&
	       in_set % XN_FRAME_SIZE >= (x->tells ? sizeof(struct told) : 0) &&
	       !(d->options & (x->sg ? (u32)~XDP_PKT_CONTD : UINT32_MAX));
}

/* Each may be a frame that never comes back. A kernel or driver that does it again and again gets a new socket. */
static __attribute__((noinline)) void drop_bad_frame(struct xsk *x, struct view *v)
{
	v->len = 0;
	view_drop(v, XN_DROP_BAD_FRAME);
	if (++x->bad_frames % BAD_FRAMES)
		return;
	x->stuck = true;
	events_tell(x->events, XN_EVENT_UMEM);
}

/* A frame of the TCP in which frames are that nobody has told the size of, but that each was one of the interface. */
static u16 any_size(const struct xsk *x, const struct packet *tcp)
{
	return (u16)(x->max_frame - VLAN_TAG - ETH_HLEN - (tcp->payload - tcp->l3));
}

/*
 * Several frames of a flow that the kernel has in one (generic XDP: GRO, TSO at the peer of a veth). Where nobody tells
 * of what size they were (gso_size is 0), any will do for TCP; datagrams joined would be another datagram.
 */
static __attribute__((noinline)) void open_joined(const struct xsk *x, struct view *v, struct told told)
{
	const u8 *p = v->pieces->ptr;
	const u32 have = min_u32(v->pieces->len, PACKET_HEADERS);
	struct virtio_net_hdr hdr = v->vnet;
	struct packet at;
	bool tcp = packet_parse(p, have, v->len, &at) && !at.fragment && at.protocol == IPPROTO_TCP;

	/* In a tunnel, or its checksum is not the kernel's to make: nothing that can be cut here. */
	if (v->needs != NEED_CSUM || (!tcp && (!told.gso_size || told.gso_type != VIRTIO_NET_HDR_GSO_UDP_L4))) {
		view_drop(v, XN_DROP_OVERSIZE);
		return;
	}
	hdr.gso_type = told.gso_type;
	hdr.gso_size = told.gso_size;
	if (tcp) {
		hdr.gso_type = at.version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
		if (!told.gso_size || (at.end - at.payload) / told.gso_size >= GSO_MAX_SEGMENTS)
			hdr.gso_size = any_size(x, &at);
		if (p[at.l4 + TCP_FLAGS] & TCP_CWR)
			hdr.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
	}
	v->needs = 0;
	vnet_judge(v, &hdr, UINT8_MAX, p, have);
}

/* Where the program tells, several in one that are no longer than a frame of the interface are known, too. */
static always_inline void look_if_joined(const struct xsk *x, struct view *v)
{
	struct told told = {0};

	if (likely(!x->tells && v->len <= x->max_frame))
		return;
	if (x->tells)
		memcpy(&told, v->pieces->ptr - sizeof(told), sizeof(told));
	if ((told.gso_size || v->len > x->max_frame) && v->port != VIEW_DROPPED)
		open_joined(x, v, told);
}

static u32 xsk_poll(struct worker *w, struct source *s)
{
	struct xsk *x = container_of(s, struct xsk, source);
	struct burst burst = {.from = x->port, .queue = x->queue, .stats = x->received};
	u32 n = xsk_peek(&x->rx, XN_BURST);
	u64 bad = 0;

	wake_driver(x);
	if (!n)
		return 0;
	for (u32 i = 0; i < n; i++)
		prefetch(x->arena->base + xsk_place(received(x, i)->addr));
	for (u32 i = 0; i < n; i++) {
		const struct xdp_desc *d = received(x, i);
		struct view *v = &w->views[i];

		if (unlikely(!is_ours(x, d))) {
			bad |= 1ull << i;
			drop_bad_frame(x, v);
			continue;
		}
		w->pieces[i] = (struct piece){x->arena->base + xsk_place(d->addr), d->len};
		open_frame(v, &w->pieces[i], 1, d->len);
		if (unlikely(x->tells))
			look_if_joined(x, v);
	}
	bridge_forward(w, &burst, w->views, n);
	for (u32 i = 0; i < n; i++)
		if (likely(!(bad >> i & 1)))
			xsk_refill(x, received(x, i)->addr);
	xsk_submit(&x->fill);
	xsk_release(&x->rx, n);
	return n;
}

const struct source_ops xsk_source = {.poll = xsk_poll};

/* ---- frames longer than a buffer ---- */

/* Descriptors of the chain that begins with the i-th of n; 0: its end has not come yet. */
static u32 chain_length(const struct xsk *x, u32 i, u32 n)
{
	for (u32 k = i; k < n; k++)
		if (!(received(x, k)->options & XDP_PKT_CONTD))
			return k - i + 1;
	return 0;
}

static void open_chain(struct xsk *x, struct view *v, struct piece *pieces, u32 i, u32 n)
{
	u32 len = 0;

	for (u32 k = 0; k < n; k++) {
		const struct xdp_desc *d = received(x, i + k);

		if (unlikely(!is_ours(x, d))) {
			drop_bad_frame(x, v);
			return;
		}
		pieces[k] = (struct piece){x->arena->base + xsk_place(d->addr), d->len};
		len += d->len;
	}
	open_frame(v, pieces, n, len);
	look_if_joined(x, v);
}

/* Whether the end of a chain has been waited for in vain. */
static bool is_endless(const struct worker *w, struct xsk *x, u32 n)
{
	if (n > WIRE_PIECES)
		return true;
	if (x->front != XSK_UNFINISHED) {
		x->front = XSK_UNFINISHED;
		x->unfinished_since = w->turn;
	}
	return w->turn - x->unfinished_since > w->cycles_per_us * UNFINISHED_US;
}

/*
 * As xsk_poll, of a socket that gets frames in several descriptors. A chain whose end is not there yet stays in the ring;
 * one that cannot be a frame goes back to the kernel, and so does what still comes of it.
 */
static u32 chains_poll(struct worker *w, struct source *s)
{
	struct xsk *x = container_of(s, struct xsk, source);
	struct burst burst = {.from = x->port, .queue = x->queue, .stats = x->received};
	u32 ready = xsk_peek(&x->rx, x->rx.mask + 1), done = 0, frames = 0, pieces = 0;

	wake_driver(x);
	for (u32 i = 0; i < min_u32(ready, XN_BURST); i++)
		prefetch(x->arena->base + xsk_place(received(x, i)->addr));
	while (done < ready && frames < XN_BURST) {
		u32 n = chain_length(x, done, ready);
		struct view *v = &w->views[frames];

		if (unlikely(x->front == XSK_SKIPPING)) {
			x->front = n ? XSK_WHOLE : XSK_SKIPPING;
			done = n ? done + n : ready;
			continue;
		}
		if (unlikely(!n && !is_endless(w, x, ready - done)))
			break;
		x->front = n ? XSK_WHOLE : XSK_SKIPPING;
		frames++;
		if (unlikely(!n || n > WIRE_PIECES)) {
			v->len = 0;
			view_drop(v, XN_DROP_FRAGS);
			done = n ? done + n : ready;
			continue;
		}
		open_chain(x, v, &w->pieces[pieces], done, n);
		pieces += n;
		done += n;
	}
	if (!done)
		return 0;
	bridge_forward(w, &burst, w->views, frames);
	for (u32 i = 0; i < done; i++)
		if (likely(is_ours(x, received(x, i))))
			xsk_refill(x, received(x, i)->addr);
	xsk_submit(&x->fill);
	xsk_release(&x->rx, done);
	return frames;
}

const struct source_ops chains_source = {.poll = chains_poll};
_Static_assert(XN_BURST *WIRE_PIECES <= WORKER_PIECES, "a burst of chains has its pieces");

/* Puts back the VLAN tag that the kernel keeps beside the frame; `frame` has VLAN_TAG bytes in front. */
static u8 *restore_tag(struct msghdr *msg, u8 *frame, u32 *len)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		struct tpacket_auxdata aux;

		if (c->cmsg_level != SOL_PACKET || c->cmsg_type != PACKET_AUXDATA ||
		    c->cmsg_len < CMSG_LEN(sizeof(aux)))
			continue;
		memcpy(&aux, CMSG_DATA(c), sizeof(aux));
		if (!(aux.tp_status & TP_STATUS_VLAN_VALID) || *len < 2 * ETH_ALEN)
			continue;
		u16 tpid = aux.tp_status & TP_STATUS_VLAN_TPID_VALID ? aux.tp_vlan_tpid : ETH_P_8021Q;
		const u8 tag[VLAN_TAG] = {(u8)(tpid >> 8), (u8)tpid, (u8)(aux.tp_vlan_tci >> 8), (u8)aux.tp_vlan_tci};

		memmove(frame - VLAN_TAG, frame, 2 * ETH_ALEN);
		frame -= VLAN_TAG;
		memcpy(frame + 2 * ETH_ALEN, tag, VLAN_TAG);
		*len += VLAN_TAG;
		break;
	}
	return frame;
}

/* Its checksum, and what several frames in one are to be cut into, are as the kernel says: nothing is guessed. */
static void open_told(struct view *v, const struct piece *piece, struct virtio_net_hdr hdr, bool tagged)
{
	v->pieces = piece;
	v->n = 1;
	v->len = piece->len;
	v->port = VIEW_FLOOD;
	v->needs = 0;
	v->vnet = (struct virtio_net_hdr){0};
	if (v->len < ETH_HLEN) {
		view_drop(v, XN_DROP_RUNT);
		return;
	}
	hdr.csum_start = (u16)(hdr.csum_start + (tagged ? VLAN_TAG : 0));
	if (vnet_asks((const u8 *)&hdr))
		vnet_judge(v, &hdr, UINT8_MAX, piece->ptr, piece->len);
	view_snapshot(v);
}

static u32 group_poll(struct worker *w, struct source *s)
{
	struct netdev *d = container_of(s, struct netdev, group);
	struct burst burst = {.from = &d->port, .stats = &d->queue[0].rx};
	struct mmsghdr msgs[GROUP_BATCH] = {0};
	struct iovec iov[GROUP_BATCH][2];
	struct virtio_net_hdr told[GROUP_BATCH]; /* PACKET_VNET_HDR: in host order */
	union {
		char bytes[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
		struct cmsghdr align;
	} control[GROUP_BATCH];

	if (d->group_failed)
		return 0;
	for (u32 i = 0; i < GROUP_BATCH; i++) {
		iov[i][0] = (struct iovec){&told[i], sizeof(told[i])};
		iov[i][1] = (struct iovec){w->group_frames[i] + VLAN_TAG, GROUP_FRAME - VLAN_TAG};
		msgs[i].msg_hdr.msg_iov = iov[i];
		msgs[i].msg_hdr.msg_iovlen = 2;
		msgs[i].msg_hdr.msg_control = &control[i];
		msgs[i].msg_hdr.msg_controllen = sizeof(control[i]);
	}
	int n = recvmmsg(d->group_fd, msgs, GROUP_BATCH, MSG_DONTWAIT | MSG_TRUNC, NULL);

	/* Several frames in one, of a kind that the header has no word for: it is gone. */
	if (n < 0 && errno == EINVAL) {
		w->views->len = 0;
		view_drop(w->views, XN_DROP_OVERSIZE);
		bridge_forward(w, &burst, w->views, 1);
		return 1;
	}
	if (n <= 0) {
		if (n < 0 && errno != EAGAIN && errno != EINTR && errno != ENETDOWN) {
			d->group_failed = true;
			events_tell(&d->port.bridge->events, XN_EVENT_SOCKET);
		}
		return 0;
	}
	for (int i = 0; i < n; i++) {
		struct view *v = &w->views[i];
		u32 len = msgs[i].msg_len < sizeof(*told) ? 0 : msgs[i].msg_len - (u32)sizeof(*told), was = len;

		if (len > GROUP_FRAME - VLAN_TAG) {
			v->len = len;
			view_drop(v, XN_DROP_TRUNCATED);
			continue;
		}
		u8 *frame = restore_tag(&msgs[i].msg_hdr, w->group_frames[i] + VLAN_TAG, &len);

		w->pieces[i] = (struct piece){frame, len};
		open_told(v, &w->pieces[i], told[i], len != was);
	}
	bridge_forward(w, &burst, w->views, (u32)n);
	return (u32)n;
}

const struct source_ops group_source = {.poll = group_poll};
