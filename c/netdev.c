/*
 * A netdev port: AF_XDP sockets, one a queue, and an AF_PACKET socket for what XDP cannot hand to two receivers.
 *
 * XDP gives frames to known guests to the sockets and passes all else to the host's stack. Group-addressed frames go to
 * the host too; the AF_PACKET socket picks them up for the guests. It is the slow path: one system call a batch.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_packet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge.h"
#include "csum.h"
#include "packet.h"

/* ---- from the wire ---- */

enum {
	/* Room before a group frame, for the VLAN tag that the kernel took off. */
	VLAN_TAG = 4,
	PAGE = 4096,
	/* The rest of a chain comes at once, or never. */
	UNFINISHED_US = 1000000,
	BAD_FRAMES = 3
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
	csum_find_partial(v);
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
	bridge_event(x->port->bridge, XN_EVENT_UMEM);
}

static u32 xsk_poll(struct worker *w, struct source *s)
{
	struct xsk *x = container_of(s, struct xsk, source);
	struct xn_queue_stats *stats = &x->port->netdev.queue[x->queue].rx;
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
	}
	bridge_forward(w, x->port, x->queue, w->views, n, stats, false);
	for (u32 i = 0; i < n; i++)
		if (likely(!(bad >> i & 1)))
			xsk_refill(x, received(x, i)->addr);
	xsk_submit(&x->fill);
	xsk_release(&x->rx, n);
	return n;
}

static const struct source_ops xsk_source = {.poll = xsk_poll};

/* ---- frames longer than a buffer ---- */

/* Descriptors of the chain that begins with the i-th of n; 0: its end has not come yet. */
static u32 chain_length(const struct xsk *x, u32 i, u32 n)
{
	for (u32 k = i; k < n; k++)
		if (!(received(x, k)->options & XDP_PKT_CONTD))
			return k - i + 1;
	return 0;
}

/*
 * More than the interface carries: several frames of a flow that the kernel has in one (generic XDP, TSO at the peer of a
 * veth), and of what size it does not tell. Of TCP any size will do. Datagrams joined would be another datagram.
 */
static __attribute__((noinline)) void open_joined(const struct xsk *x, struct view *v)
{
	const u8 *p = v->pieces->ptr;
	struct packet at;

	if (v->needs != NEED_CSUM || !packet_parse(p, v->pieces->len, v->len, &at) || at.fragment ||
	    at.protocol != IPPROTO_TCP || v->vnet.csum_start != at.l4 || at.end != v->len) {
		view_drop(v, XN_DROP_OVERSIZE);
		return;
	}
	v->needs |= at.version == 4 ? NEED_TSO4 : NEED_TSO6;
	v->vnet.gso_type = at.version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
	v->vnet.hdr_len = at.payload;
	v->vnet.gso_size = (u16)(x->max_frame - VLAN_TAG - ETH_HLEN - (at.payload - at.l3));
	if (p[at.l4 + TCP_FLAGS] & TCP_CWR) {
		v->needs |= NEED_ECN;
		v->vnet.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
	}
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
	if (unlikely(v->len > x->max_frame && v->port != VIEW_DROPPED))
		open_joined(x, v);
}

/* Whether the end of a chain has been waited for in vain. */
static bool is_endless(const struct worker *w, struct xsk *x, u32 n)
{
	if (n > WIRE_PIECES)
		return true;
	if (!x->unfinished_since)
		x->unfinished_since = w->turn;
	return w->turn - x->unfinished_since > w->bridge->cycles_per_us * UNFINISHED_US;
}

/*
 * As xsk_poll, of a socket that gets frames in several descriptors. A chain whose end is not there yet stays in the ring;
 * one that cannot be a frame goes back to the kernel, and so does what still comes of it.
 */
static u32 chains_poll(struct worker *w, struct source *s)
{
	struct xsk *x = container_of(s, struct xsk, source);
	struct xn_queue_stats *stats = &x->port->netdev.queue[x->queue].rx;
	u32 ready = xsk_peek(&x->rx, x->rx.mask + 1), done = 0, frames = 0, pieces = 0;

	wake_driver(x);
	for (u32 i = 0; i < min_u32(ready, XN_BURST); i++)
		prefetch(x->arena->base + xsk_place(received(x, i)->addr));
	while (done < ready && frames < XN_BURST) {
		u32 n = chain_length(x, done, ready);
		struct view *v = &w->views[frames];

		if (unlikely(x->skipping)) {
			x->skipping = !n;
			done = n ? done + n : ready;
			continue;
		}
		if (unlikely(!n && !is_endless(w, x, ready - done)))
			break;
		x->unfinished_since = 0;
		frames++;
		if (unlikely(!n || n > WIRE_PIECES)) {
			v->len = 0;
			view_drop(v, XN_DROP_FRAGS);
			x->skipping = !n;
			done = n ? done + n : ready;
			continue;
		}
		open_chain(x, v, &w->pieces[pieces], done, n);
		pieces += n;
		done += n;
	}
	if (!done)
		return 0;
	bridge_forward(w, x->port, x->queue, w->views, frames, stats, false);
	for (u32 i = 0; i < done; i++)
		if (likely(is_ours(x, received(x, i))))
			xsk_refill(x, received(x, i)->addr);
	xsk_submit(&x->fill);
	xsk_release(&x->rx, done);
	return frames;
}

static const struct source_ops chains_source = {.poll = chains_poll};
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

static u32 group_poll(struct worker *w, struct source *s)
{
	struct netdev *d = container_of(s, struct netdev, group);
	struct port *p = container_of(d, struct port, netdev);
	struct xn_queue_stats *stats = &d->queue[0].rx;
	struct mmsghdr msgs[GROUP_BATCH] = {0};
	struct iovec iov[GROUP_BATCH];
	union {
		char bytes[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
		struct cmsghdr align;
	} control[GROUP_BATCH];

	if (d->group_failed)
		return 0;
	for (u32 i = 0; i < GROUP_BATCH; i++) {
		iov[i] = (struct iovec){w->group_frames[i] + VLAN_TAG, GROUP_FRAME - VLAN_TAG};
		msgs[i].msg_hdr.msg_iov = &iov[i];
		msgs[i].msg_hdr.msg_iovlen = 1;
		msgs[i].msg_hdr.msg_control = &control[i];
		msgs[i].msg_hdr.msg_controllen = sizeof(control[i]);
	}
	int n = recvmmsg(d->group_fd, msgs, GROUP_BATCH, MSG_DONTWAIT | MSG_TRUNC, NULL);

	if (n <= 0) {
		if (n < 0 && errno != EAGAIN && errno != EINTR && errno != ENETDOWN) {
			d->group_failed = true;
			bridge_event(p->bridge, XN_EVENT_SOCKET);
		}
		return 0;
	}
	for (int i = 0; i < n; i++) {
		struct view *v = &w->views[i];
		u32 len = msgs[i].msg_len;

		if (len > GROUP_FRAME - VLAN_TAG) {
			v->len = len;
			view_drop(v, XN_DROP_TRUNCATED);
			continue;
		}
		u8 *frame = restore_tag(&msgs[i].msg_hdr, w->group_frames[i] + VLAN_TAG, &len);

		w->pieces[i] = (struct piece){frame, len};
		open_frame(v, &w->pieces[i], 1, len);
	}
	bridge_forward(w, p, 0, w->views, (u32)n, stats, false);
	return (u32)n;
}

static const struct source_ops group_source = {.poll = group_poll};

/* ---- to the wire ---- */

static struct netdev_queue *tx_queue(struct netdev *d, u32 queue)
{
	return &d->queue[d->ready[queue % d->ready_n]];
}

static void lock_tx(struct xsk *x)
{
	if (x->locked)
		spin_lock(&x->lock);
}

static void unlock_tx(struct xsk *x)
{
	if (x->locked)
		spin_unlock(&x->lock);
}

u32 netdev_room(struct worker *w, struct port *p, u32 queue, u32 wanted)
{
	struct netdev *d = &p->netdev;

	if (!d->ready_n)
		return UINT32_MAX;
	struct netdev_queue *nq = tx_queue(d, queue);
	struct xsk *x = nq->xsk;

	/* Where another worker may take the room meanwhile, or nothing moves at all, frames are dropped instead. */
	if (x->shared || x->down || x->gone)
		return UINT32_MAX;
	lock_tx(x);
	xsk_reap(x);
	u32 room = min_u32(x->free_n, xsk_tx_room(x));

	if (unlikely((room < XN_BURST || room < wanted) && x->pending)) {
		x->pending = !xsk_kick(x, &nq->tx.kicks);
		xsk_reap(x);
		room = min_u32(x->free_n, xsk_tx_room(x));
	}
	unlock_tx(x);
	if (room >= wanted) {
		x->blocked_since = 0;
		return room;
	}
	if (!x->blocked_since)
		x->blocked_since = cycles();
	/* A driver that has taken nothing for a second is stuck: a guest must not be stuck with it. */
	else if (cycles() - x->blocked_since > w->bridge->cycles_per_us * 1000000)
		return UINT32_MAX;
	return 0;
}

/* The sum of a shorter frame, made as it is copied, costs no more than leaving it to the interface. */
enum { LEAVE_CSUM_FROM = 512 };

static bool leaves_csum(const struct xsk *x, const struct view *v)
{
	return x->leaves_csum && v->len >= LEAVE_CSUM_FROM;
}

/*
 * Leaves the checksum of the frame at `to` to the interface; the option of the descriptor that says so. The field is in the
 * snapshot of the headers (vnet_judge), so in the first descriptor.
 */
static u32 leave_csum(u8 *to, const struct view *v, struct xn_queue_stats *stats)
{
	const struct tx_metadata metadata = {
		.flags = XDP_TXMD_FLAGS_CHECKSUM, .csum_start = v->vnet.csum_start, .csum_offset = v->vnet.csum_offset};

	memcpy(to - TX_METADATA, &metadata, sizeof(metadata));
	count(&stats->csum_partial, 1);
	return XDP_TX_METADATA;
}

/* Shorter frames are padded with zeroes: the frame in the arena held somebody else's bytes before. */
static struct xdp_desc write_frame(const struct xsk *x, u64 addr, const struct view *v, struct xn_queue_stats *stats)
{
	struct xdp_desc desc = {.addr = addr, .len = v->len};
	u8 *to = x->arena->base + addr;

	if (likely(!v->needs)) {
		view_copy(to, v);
	} else if (leaves_csum(x, v)) {
		view_copy(to, v);
		desc.options = leave_csum(to, v, stats);
	} else {
		csum_copy_view(to, v);
		count(&stats->csum_computed, 1);
	}
	if (unlikely(v->len < ETH_ZLEN)) {
		memset(to + v->len, 0, ETH_ZLEN - v->len);
		desc.len = ETH_ZLEN;
	}
	return desc;
}

/* A frame that takes several descriptors: all of them, or none. */
static __attribute__((noinline)) bool write_large(struct xsk *x, const struct view *v, struct xn_queue_stats *stats)
{
	u32 n = (v->len + TX_PIECE - 1) / TX_PIECE, left = v->len;
	struct xdp_desc *first = xsk_desc_at(&x->tx, x->tx.cached_producer);
	u8 *frames[WIRE_PIECES];

	if (unlikely(min_u32(x->free_n, xsk_tx_room(x)) < n)) {
		xsk_reap(x);
		if (min_u32(x->free_n, xsk_tx_room(x)) < n)
			return false;
	}
	for (u32 i = 0; i < n; i++) {
		u64 addr = x->free[--x->free_n];
		u32 len = min_u32(left, TX_PIECE);

		left -= len;
		frames[i] = x->arena->base + addr;
		*xsk_desc_at(&x->tx, x->tx.cached_producer++) =
			(struct xdp_desc){.addr = addr, .len = len, .options = left ? XDP_PKT_CONTD : 0};
	}
	if (!v->needs) {
		view_copy_large(frames, v);
	} else if (leaves_csum(x, v)) {
		view_copy_large(frames, v);
		first->options |= leave_csum(*frames, v, stats);
	} else {
		csum_copy_large(frames, v);
		count(&stats->csum_computed, 1);
	}
	return true;
}

_Static_assert((XN_MAX_FRAME + TX_PIECE - 1) / TX_PIECE <= WIRE_PIECES, "any frame is one chain");

void netdev_reap(struct xsk *x)
{
	lock_tx(x);
	xsk_reap(x);
	unlock_tx(x);
}

/*
 * Whether a frame can be sent from where it lies: in one piece, in no need of padding, and not so short that the copy
 * costs less than the loan. A driver that maps pages one by one takes no frame across the border of two, nor the place of
 * its metadata, which a lent frame has none of.
 */
static bool can_lend(const struct worker *w, const struct xsk *x, const struct view *v)
{
	if (v->n != 1 || v->needs || v->len < w->bridge->config.copybreak || v->len < ETH_ZLEN)
		return false;
	/* A snapshot, whose checksum was made for another port. */
	if (v->pieces->ptr >= w->headers[0] && v->pieces->ptr < (const u8 *)(w->headers + XN_BURST))
		return false;
	const u32 front = x->metadata ? TX_METADATA : 0;

	return !x->zerocopy || ((uintptr_t)v->pieces->ptr - front) % PAGE + front + v->len <= PAGE;
}

void netdev_deliver(struct worker *w, struct port *p, u32 queue, const struct view *views, const u8 *which, u32 n)
{
	struct netdev *d = &p->netdev;

	if (unlikely(!d->ready_n)) {
		/* No socket, no owner: several workers may count here. */
		__atomic_fetch_add(&d->queue[0].tx.drops[XN_DROP_NOT_READY], n, __ATOMIC_RELAXED);
		return;
	}
	struct netdev_queue *nq = tx_queue(d, queue);
	struct xsk *x = nq->xsk;
	struct virtqueue *lender = w->lender;
	u64 sent = 0, bytes = 0, in_place = 0;

	/* The bytes must be in the socket's UMEM, all of the guest's. */
	if (lender && (x->umem < lender->port->guest.umem || x->policy < lender->port->guest.lends))
		lender = NULL;
	lock_tx(x);
	if (unlikely(x->down || x->gone)) {
		count(&nq->tx.drops[XN_DROP_NOT_READY], n);
		goto out;
	}
	if (x->free_n < n || x->copies)
		xsk_reap(x);
	for (u32 i = 0; i < n; i++) {
		const struct view *v = &views[which[i]];

		if (unlikely(v->len > x->max_plain)) {
			if (v->len > x->max_frame) {
				count(&nq->tx.drops[XN_DROP_OVERSIZE], 1);
			} else if (write_large(x, v, &nq->tx)) {
				bytes += v->len;
				sent++;
			} else {
				count(&nq->tx.drops[XN_DROP_NO_FRAME], 1);
			}
			continue;
		}
		if (unlikely(!x->free_n || !xsk_tx_room(x))) {
			count(&nq->tx.drops[XN_DROP_NO_FRAME], 1);
			continue;
		}
		struct xdp_desc *desc = xsk_desc_at(&x->tx, x->tx.cached_producer++);

		bytes += v->len;
		sent++;
		/* Flooded to several interfaces, it is lent to the first: a loan has one end. */
		if (lender && !(w->lent >> which[i] & 1) && can_lend(w, x, v)) {
			*desc = xsk_lend(x, &lender->loans[(lender->loans_tail + which[i]) & lender->loans_mask],
					 v->pieces->ptr, v->len);
			w->lent |= 1ull << which[i];
			in_place++;
			continue;
		}
		u64 addr = x->free[--x->free_n];

		*desc = write_frame(x, addr, v, &nq->tx);
	}
	if (!sent)
		goto out;
	xsk_submit(&x->tx);
	count(&nq->tx.packets, sent);
	count(&nq->tx.bytes, bytes);
	count(&nq->tx.in_place, in_place);
	count(&nq->tx.bursts, 1);
	worker_owes_kick(w, x, (u32)sent);
out:
	unlock_tx(x);
}

bool netdev_kick(struct xsk *x)
{
	struct netdev_queue *nq = &x->port->netdev.queue[x->queue];
	bool was_down = x->down, was_gone = x->gone;

	lock_tx(x);
	x->pending = !xsk_kick(x, &nq->tx.kicks);
	/* What waits for an interface to come up again must not keep a guest's buffers. */
	if (unlikely(x->down || x->gone))
		xsk_recall(x);
	unlock_tx(x);
	if (x->down != was_down || x->gone != was_gone)
		bridge_event(x->port->bridge, XN_EVENT_SOCKET);
	return !x->pending;
}

void netdev_is_stuck(struct xsk *x)
{
	lock_tx(x);
	xsk_recall(x);
	bool keeps = x->lent_n;

	/* It may be stuck already, for what it has delivered. */
	x->stuck |= keeps;
	unlock_tx(x);
	if (keeps)
		bridge_event(x->port->bridge, XN_EVENT_UMEM);
}

/* ---- control ---- */

void netdev_settle(struct port *p)
{
	struct netdev *d = &p->netdev;
	u32 workers = p->bridge->config.workers;
	bool in_line = true;

	d->ready_n = 0;
	for (u32 i = 0; i < d->queues; i++) {
		if (!d->queue[i].xsk)
			continue;
		in_line &= i == d->ready_n;
		d->ready[d->ready_n++] = i;
	}
	bool shared = workers > 1 && (!in_line || d->ready_n % workers);

	for (u32 i = 0; i < d->queues; i++)
		if (d->queue[i].xsk) {
			d->queue[i].xsk->shared = shared;
			d->queue[i].xsk->locked = shared || (workers > 1 && d->queue[i].xsk->umem);
		}
}

static struct netdev_queue *queue_of(struct xn_bridge *b, u32 port, u32 queue)
{
	struct port *p = bridge_port(b, port, PORT_NETDEV);

	return p && queue < p->netdev.queues ? &p->netdev.queue[queue] : NULL;
}

/* While parked. */
static void close_queue(struct port *p, struct netdev_queue *nq)
{
	struct xsk *x = nq->xsk;

	if (!x)
		return;
	/* The last chance for what was submitted in the turn before. */
	if (x->pending)
		(void)xsk_kick(x, &nq->tx.kicks);
	/* A socket whose interface is gone has no statistics any more. */
	(void)xsk_statistics(x, &nq->past);
	worker_remove_source(&x->source);
	for (u32 i = 0; i < p->bridge->config.workers; i++)
		worker_forget_xsk(p->bridge->workers[i], x);
	xsk_close(x);
	nq->xsk = NULL;
	netdev_settle(p);
}

void netdev_recall(struct xsk *x, bool patient)
{
	if (patient) {
		xsk_recall(x);
		xsk_reap(x);
		return;
	}
	bridge_event(x->port->bridge, XN_EVENT_UMEM);
	close_queue(x->port, &x->port->netdev.queue[x->queue]);
}

static void drop_group(struct netdev *d)
{
	if (d->group_fd < 0)
		return;
	worker_remove_source(&d->group);
	close(d->group_fd);
	d->group_fd = -1;
}

void netdev_release(struct port *p)
{
	struct netdev *d = &p->netdev;

	drop_group(d);
	for (u32 i = 0; i < d->queues; i++)
		close_queue(p, &d->queue[i]);
	free(d->queue);
	*d = (struct netdev){.group_fd = -1};
}

int xn_netdev_open_queue(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t ifindex, uint32_t max_frame,
			 uint32_t zerocopy, uint32_t flags)
{
	struct netdev_queue *nq = queue_of(b, port, queue);
	struct xsk *x;

	if (!nq)
		return -ENOENT;
	if (zerocopy > XN_ZEROCOPY_ON)
		return -EINVAL;
	if (nq->xsk)
		return -EALREADY;
	int r = xsk_open(&x, &b->arena, ifindex, queue, max_frame, zerocopy, flags);

	if (r < 0)
		return r;
	x->port = &b->ports[port];
	x->queue = queue;
	x->source = (struct source){.ops = x->sg ? &chains_source : &xsk_source,
				    .fd = x->fd,
				    .spins = true,
				    .unwatched = true,
				    .kicks = &nq->rx.kicks};
	workers_park(b);
	r = worker_add_source(b->workers[queue % b->config.workers], &x->source);
	if (!r)
		nq->xsk = x;
	netdev_settle(x->port);
	workers_resume(b);
	if (r < 0)
		xsk_close(x);
	return r;
}

int xn_netdev_is_stale(struct xn_bridge *b, uint32_t port, uint32_t zerocopy)
{
	const struct port *p = bridge_port(b, port, PORT_NETDEV);

	if (!p)
		return -ENOENT;
	for (u32 i = 0; i < p->netdev.queues; i++) {
		const struct xsk *x = p->netdev.queue[i].xsk;

		if (!x || x->stuck || x->umem != arena_umem(&b->arena, zerocopy != XN_ZEROCOPY_OFF))
			return 1;
	}
	return 0;
}

int xn_netdev_close_queue(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	struct netdev_queue *nq = queue_of(b, port, queue);

	if (!nq)
		return -ENOENT;
	workers_park(b);
	close_queue(&b->ports[port], nq);
	workers_resume(b);
	return 0;
}

int xn_netdev_queue_fd(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	const struct netdev_queue *nq = queue_of(b, port, queue);

	return nq && nq->xsk ? nq->xsk->fd : -ENOENT;
}

int xn_netdev_set_group_fd(struct xn_bridge *b, uint32_t port, int fd)
{
	struct port *p = bridge_port(b, port, PORT_NETDEV);
	int r = 0;

	if (!p)
		return -ENOENT;
	struct netdev *d = &p->netdev;
	struct worker *w = b->workers[0];

	workers_park(b);
	drop_group(d);
	if (fd >= 0) {
		if (!w->group_frames)
			w->group_frames = calloc(GROUP_BATCH, sizeof(*w->group_frames));
		d->group_fd = w->group_frames ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
		r = d->group_fd < 0 ? (w->group_frames ? -errno : -ENOMEM) : 0;
		d->group_failed = false;
		d->group = (struct source){.ops = &group_source, .fd = d->group_fd};
		if (!r)
			r = worker_add_source(w, &d->group);
		if (r && d->group_fd >= 0) {
			close(d->group_fd);
			d->group_fd = -1;
		}
	}
	workers_resume(b);
	return r;
}

int xn_netdev_xsk_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, struct xn_xsk_stats *out)
{
	const struct netdev_queue *nq = queue_of(b, port, queue);

	if (!nq)
		return -ENOENT;
	*out = nq->past;
	if (!nq->xsk)
		return 0;
	const struct xsk *x = nq->xsk;

	(void)xsk_statistics(x, out);
	out->open = 1;
	out->zerocopy = x->zerocopy;
	out->frames_free = __atomic_load_n(&x->free_n, __ATOMIC_RELAXED);
	out->frames_fill = x->arena->frames / 2;
	out->frames_tx = x->arena->frames / 2 - out->frames_free;
	out->in_flight = __atomic_load_n(&x->lent_n, __ATOMIC_RELAXED);
	out->umem = x->umem_len;
	return 0;
}
