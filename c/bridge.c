#include "bridge.h"

#include "csum.h"
#include "packet.h"

#include <linux/if_arp.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { MAC_CONTROL = 0x8808 };

/* ---- the way of a burst ---- */

/* Remembers where a frame came from. False: the address is not this port's to use. */
static bool learn(struct worker *w, const struct port *from, u64 src, u16 vlan)
{
	struct xn_bridge *b = w->bridge;

	if (from->kind == PORT_GUEST) {
		if (from->check_source && src != from->mac)
			return false;
		if (unlikely(mac_is_group(src) || !src))
			return false;
	} else if (mac_is_group(src) || !src) {
		return true;
	}
	switch (fdb_learn(b->fdb, src, vlan, from->id, from->kind == PORT_GUEST, w->now)) {
	case FDB_LEARNED:
		bridge_event(b, XN_EVENT_FDB);
		return true;
	case FDB_FOREIGN:
		/* Another guest's own address. On the wire that may be our own frame coming back, or the guest on its way. */
		return from->kind != PORT_GUEST;
	case FDB_KNOWN:
		break;
	}
	return true;
}

/*
 * What one station says to the bridge or the card at the other end of its cable, and no bridge passes on: to the reserved
 * group addresses 01-80-C2-00-00-00 to -0F (IEEE 802.1Q, 8.6.3: spanning tree, LACP, LLDP), or MAC control, which pauses
 * a card (802.3, 31). From a guest it would be for the bridges and cards outside.
 */
static bool is_link_local(const struct view *v, u64 dst)
{
	return (dst & ~(0xfull << 40)) == 0x0000c28001 || load_be16(v->head + 12) == MAC_CONTROL;
}

/* No address: of those, only 48 bits are set. The address of all zeroes is one that a frame may carry. */
#define NO_MAC UINT64_MAX

/* Gives each frame its way; whether any may go to an interface. */
static bool classify(struct worker *w, const struct port *from, struct view *views, u32 n)
{
	struct xn_bridge *b = w->bridge;
	u64 last_src = 0, last_dst = NO_MAC;
	u16 last_vlan = 0, last_port = 0;
	bool good = false, to_netdev = false;

	for (u32 i = 0; i < n; i++) {
		struct view *v = &views[i];

		if (v->port == VIEW_DROPPED)
			continue;
		u64 src = view_src(v), dst = view_dst(v);
		u16 vlan = view_vlan(v);

		if (unlikely(is_link_local(v, dst)) && from->kind == PORT_GUEST) {
			view_drop(v, XN_DROP_POLICY);
			continue;
		}
		/* Bursts come in trains of one flow: look up what differs. */
		if (unlikely(last_dst == NO_MAC || src != last_src || vlan != last_vlan))
			good = learn(w, from, src, vlan);
		if (unlikely(!good)) {
			view_drop(v, XN_DROP_SPOOF);
			last_dst = NO_MAC;
			continue;
		}
		if (dst != last_dst || vlan != last_vlan) {
			u32 port = mac_is_group(dst) ? FDB_NONE : fdb_lookup(b->fdb, dst, vlan, w->now);

			last_port = port == FDB_NONE ? VIEW_FLOOD : (u16)port;
			to_netdev |= port != FDB_NONE && b->ports[port].kind == PORT_NETDEV;
		}
		last_src = src;
		last_dst = dst;
		last_vlan = vlan;
		v->port = last_port;
		/* Back where it came from; or from one interface to another, which would close loops of the networks outside. */
		if (unlikely(v->port == from->id || (v->port < VIEW_FLOOD && from->kind == PORT_NETDEV &&
						     b->ports[v->port].kind == PORT_NETDEV)))
			view_drop(v, XN_DROP_NO_PORT);
	}
	return to_netdev;
}

static __attribute__((noinline)) u32 descriptors_of_large(const struct view *v)
{
	u32 longest = v->len;

	if (v->needs & NEED_CUT)
		longest = min_u32(v->vnet.hdr_len + v->vnet.gso_size, longest) + IPV6_FRAGMENT_HDR;
	return min_u32(vnet_segments(v) * ((longest + TX_PIECE - 1) / TX_PIECE), XN_MIN_FRAMES / 2);
}

/* Descriptors that a view is on the wire, at most; no more than the smallest set of frames has room for. */
static u32 descriptors_of(const struct view *v)
{
	return likely(v->len <= TX_PIECE && !(v->needs & NEED_CUT)) ? 1 : descriptors_of_large(v);
}

/* How many views, from the first, can go before one finds its netdev full. */
static u32 with_room(struct worker *w, u32 queue, const struct view *views, u32 n)
{
	struct xn_bridge *b = w->bridge;
	u32 port = VIEW_DROPPED, room = 0;

	for (u32 i = 0; i < n; i++) {
		if (views[i].port >= VIEW_FLOOD || b->ports[views[i].port].kind != PORT_NETDEV)
			continue;
		if (views[i].port != port) {
			/* A burst to several interfaces is rare; the first of them decides. */
			if (port != VIEW_DROPPED)
				continue;
			port = views[i].port;
			room = netdev_room(w, &b->ports[port], queue, descriptors_of(&views[i]));
		}
		u32 wanted = descriptors_of(&views[i]);

		if (room < wanted)
			return i;
		room -= wanted;
	}
	return n;
}

static void deliver_plain(struct worker *w, struct port *to, u32 queue, const struct view *views, const u8 *which,
			  u32 n)
{
	if (likely(to->kind == PORT_GUEST))
		guest_deliver(w, to, queue, views, which, n);
	else
		netdev_deliver(w, to, queue, views, which, n);
}

/* What a port does itself: a guest what it has agreed to; an interface's checksums are seen to as the frame is copied. */
static u8 takes(const struct port *to)
{
	return to->kind == PORT_GUEST ? to->guest.takes : NEED_CSUM;
}

/* Completes a checksum that the port does not take as it is. What becomes of it at an interface is counted there. */
static void suit_csum(const struct port *to, struct view *v, struct xn_queue_stats *stats)
{
	if (v->needs & ~takes(to)) {
		csum_complete(v);
		count(&stats->csum_completed, 1);
	} else if (v->needs && to->kind == PORT_GUEST) {
		count(&stats->csum_partial, 1);
	}
}

/* Cuts a frame that the port does not take whole. */
static void deliver_cut(struct worker *w, struct port *to, u32 queue, struct view *whole, struct xn_queue_stats *stats)
{
	struct virtqueue *lender = w->lender;
	struct gso_room *room = &w->cut;
	u8 which[XN_BURST];
	struct gso cut;
	u32 made = 0, n;

	/* The payload of a segment is no chain of its own. */
	w->lender = NULL;
	gso_start(&cut, whole);
	while ((n = gso_next(&cut, room))) {
		for (u32 i = 0; i < n; i++) {
			which[i] = (u8)i;
			suit_csum(to, &room->views[i], stats);
		}
		deliver_plain(w, to, queue, room->views, which, n);
		made += n;
	}
	w->lender = lender;
	/* That of a datagram, over all of its fragments. */
	if (whole->needs & NEED_UFO)
		count(&stats->csum_completed, 1);
	count(&stats->cut, 1);
	count(&stats->segments, made - 1);
}

/* In order: what the port takes as it is in runs, the others changed into what it does take. */
static __attribute__((noinline)) void deliver_changed(struct worker *w, struct port *to, u32 queue, struct view *views,
						      u8 *which, u32 n, struct xn_queue_stats *stats)
{
	u32 from = 0;

	for (u32 i = 0; i < n; i++) {
		struct view *v = &views[which[i]];
		u8 missing = v->needs & (u8)~takes(to);

		if (missing & NEED_CUT) {
			if (i > from)
				deliver_plain(w, to, queue, views, which + from, i - from);
			deliver_cut(w, to, queue, v, stats);
			from = i + 1;
		} else {
			suit_csum(to, v, stats);
		}
	}
	if (n > from)
		deliver_plain(w, to, queue, views, which + from, n - from);
}

/* Frames that all go to one port; `plain`: none of them needs anything. */
static always_inline void deliver(struct worker *w, struct port *to, u32 queue, struct view *views, u8 *which, u32 n,
				  bool plain, struct xn_queue_stats *stats)
{
	if (likely(plain))
		deliver_plain(w, to, queue, views, which, n);
	else
		deliver_changed(w, to, queue, views, which, n, stats);
}

/* From the wire to the one guest that it is for: frames of a flow in one, where it takes such. Returns how many are left. */
static u32 join(struct worker *w, const struct port *to, struct view *views, u8 *which, u32 n,
		struct xn_queue_stats *stats)
{
	struct gro_done done = {0};

	n = gro_join(&w->joined, views, which, n, takes(to), &done);
	count(&stats->joined, done.joined);
	count(&stats->csum_verified, done.verified);
	return n;
}

static void forward_unicast(struct worker *w, const struct port *from, u32 port, u32 queue, struct view *views,
			    u8 *which, u32 n, bool plain, struct xn_queue_stats *stats)
{
	struct port *to = &w->bridge->ports[port];

	if (from->kind == PORT_NETDEV && takes(to) & NEED_CUT) {
		u32 left = join(w, to, views, which, n, stats);

		plain = plain && left == n;
		n = left;
	}
	deliver(w, to, queue, views, which, n, plain, stats);
}

/* Takes those with the first one's port out of a mask; returns how many. */
static u32 take_one_way(const struct view *views, u64 *mask, u8 *which)
{
	u32 port = views[__builtin_ctzll(*mask)].port, n = 0;

	for (u64 left = *mask; left; left &= left - 1) {
		u32 i = (u32)__builtin_ctzll(left);

		if (views[i].port != port)
			continue;
		which[n++] = (u8)i;
		*mask &= ~(left & -left);
	}
	return n;
}

static bool floods_to(const struct port *from, const struct port *to)
{
	return to != from && port_is_ready(to) && !(from->kind == PORT_NETDEV && to->kind == PORT_NETDEV);
}

static void flood(struct worker *w, struct port *from, u32 queue, struct view *views, u64 mask, bool plain,
		  struct xn_queue_stats *stats)
{
	struct xn_bridge *b = w->bridge;
	u8 which[XN_BURST];
	u32 n = 0, ports = 0;

	for (; mask; mask &= mask - 1)
		which[n++] = (u8)__builtin_ctzll(mask);
	for (u32 i = 0; i < b->ports_n; i++) {
		if (!floods_to(from, &b->ports[i]))
			continue;
		ports++;
		deliver(w, &b->ports[i], queue, views, which, n, plain, stats);
	}
	if (ports)
		count(&stats->copies, (u64)(ports - 1) * n);
	else
		count(&stats->drops[XN_DROP_NO_PORT], n);
}

/* Where the frames of a burst go, a bit each, and what they are together. */
struct sorted {
	u64 unicast, flooded, dropped;
	u64 bytes;
	bool one_way; /* all are unicast, to one port */
	bool plain;   /* none needs anything */
};

static always_inline struct sorted sort(const struct view *views, u32 n)
{
	struct sorted s = {0};
	u16 port = views->port, other = 0;
	u8 needs = 0;

	for (u32 i = 0; i < n; i++) {
		const struct view *v = &views[i];

		s.bytes += v->len;
		needs |= v->needs;
		other |= v->port ^ port;
	}
	s.plain = !needs;
	s.one_way = port < VIEW_FLOOD && !other;
	if (likely(s.one_way))
		return s;
	for (u32 i = 0; i < n; i++) {
		u64 *mask = views[i].port < VIEW_FLOOD	  ? &s.unicast
			    : views[i].port == VIEW_FLOOD ? &s.flooded
							  : &s.dropped;

		*mask |= 1ull << i;
	}
	return s;
}

u32 bridge_forward(struct worker *w, struct port *from, u32 queue, struct view *views, u32 n,
		   struct xn_queue_stats *stats, bool may_wait)
{
	bool to_netdev = classify(w, from, views, n);
	u8 which[XN_BURST];

	if (may_wait && to_netdev)
		n = with_room(w, queue, views, n);
	if (!n)
		return 0;
	struct sorted s = sort(views, n);

	count(&stats->packets, n);
	count(&stats->bytes, s.bytes);
	count(&stats->bursts, 1);
	count(&w->stats.packets, n);
	if (likely(s.one_way)) {
		for (u32 i = 0; i < XN_BURST; i++)
			which[i] = (u8)i;
		forward_unicast(w, from, views->port, queue, views, which, n, s.plain, stats);
		return n;
	}
	for (; s.dropped; s.dropped &= s.dropped - 1)
		count(&stats->drops[views[__builtin_ctzll(s.dropped)].drop], 1);
	while (s.unicast) {
		u32 port = views[__builtin_ctzll(s.unicast)].port, taken = take_one_way(views, &s.unicast, which);

		forward_unicast(w, from, port, queue, views, which, taken, s.plain, stats);
	}
	if (s.flooded)
		flood(w, from, queue, views, s.flooded, s.plain, stats);
	return n;
}

bool bridge_announce(struct worker *w, struct port *from, u64 mac, struct xn_queue_stats *stats)
{
	/* RFC 903: a request for the protocol address of the sender itself. Only its source matters to anybody. */
	struct {
		struct ethhdr eth;
		__be16 hw_type, proto_type;
		u8 hw_len, proto_len;
		__be16 op;
		u8 sender[ETH_ALEN], sender_ip[4];
		u8 target[ETH_ALEN], target_ip[4];
		u8 pad[18];
	} __attribute__((packed)) frame = {.eth.h_dest = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
					   .eth.h_proto = htobe16(ETH_P_RARP),
					   .hw_type = htobe16(ARPHRD_ETHER),
					   .proto_type = htobe16(ETH_P_IP),
					   .hw_len = ETH_ALEN,
					   .proto_len = 4,
					   .op = htobe16(ARPOP_RREQUEST)};
	struct piece piece = {(u8 *)&frame, sizeof(frame)};
	struct view view = {.pieces = &piece, .n = 1, .len = sizeof(frame), .port = VIEW_FLOOD};

	_Static_assert(sizeof(frame) == ETH_ZLEN, "the shortest frame, but for its checksum");
	mac = htole64(mac);
	memcpy(frame.eth.h_source, &mac, ETH_ALEN);
	memcpy(frame.sender, &mac, ETH_ALEN);
	memcpy(frame.target, &mac, ETH_ALEN);
	view_snapshot(&view);
	/* It may have slept for long, or not have begun. */
	w->now = (u32)(monotonic_ns() / 1000000000u);
	w->turn = cycles();
	w->lender = NULL;
	if (!learn(w, from, view_src(&view), 0))
		return false;
	bridge_forward(w, from, 0, &view, 1, stats, false);
	return true;
}

void bridge_event(struct xn_bridge *b, enum xn_event event)
{
	static const u64 one = 1;

	if (__atomic_fetch_or(&b->events, event, __ATOMIC_ACQ_REL) & event)
		return;
	/* Does not block: a counter near its limit has been readable for long. */
	if (write(b->event_fd, &one, sizeof(one)) < 0)
		return;
}

/* ---- public: the bridge ---- */

static const char *const drop_names[] = {
	"short",     "runt",	  "oversize",  "pieces",   "gso_type", "gso_size",  "gso_csum", "gso_proto", "csum",
	"l3",	     "l4",	  "ipv6_ext",  "fragment", "vlan",     "spoof",	    "policy",	"disabled",  "no_port",
	"no_buffer", "too_small", "not_ready", "broken",   "no_frame", "bad_frame", "frags",	"truncated"};
_Static_assert(ARRAY_LEN(drop_names) == XN_DROP_COUNT, "a name for every drop reason");
_Static_assert(ARRAY_LEN(((struct xn_queue_stats *)0)->drops) == XN_DROP_COUNT, "a counter for every drop reason");

const char *xn_drop_name(uint32_t drop)
{
	return drop < XN_DROP_COUNT ? drop_names[drop] : NULL;
}

static const char *const broken_names[] = {"",		"avail_jump", "head",	      "next",  "loop", "addr",
					   "direction", "indirect",   "indirect_len", "chain", "id",   "memory"};
_Static_assert(ARRAY_LEN(broken_names) == XN_BROKEN_COUNT, "a name for every way to break");

const char *xn_broken_name(uint32_t broken)
{
	return broken < XN_BROKEN_COUNT ? broken_names[broken] : NULL;
}

/* TSC ticks in a microsecond, measured once against the monotonic clock. */
static u64 measure_cycles_per_us(void)
{
	u64 ns = monotonic_ns(), c = cycles(), passed;

	do
		passed = monotonic_ns() - ns;
	while (passed < 2000000);
	return (cycles() - c) * 1000 / passed;
}

struct xn_bridge *xn_bridge_new(const struct xn_bridge_config *config)
{
	u32 frames = config->frames_per_queue;

	if (!config->workers || config->workers > XN_MAX_WORKERS || config->zerocopy > XN_ZEROCOPY_ON ||
	    frames < XN_MIN_FRAMES || frames > 65536 || frames & (frames - 1)) {
		errno = EINVAL;
		return NULL;
	}
	struct xn_bridge *b = calloc(1, sizeof(*b));

	if (!b)
		return NULL;
	b->config = *config;
	b->event_fd = -1;
	pthread_mutex_init(&b->parking.mutex, NULL);
	pthread_cond_init(&b->parking.changed, NULL);
	b->cycles_per_us = measure_cycles_per_us();
	b->spin_cycles = config->spin_us * b->cycles_per_us;
	b->fdb = fdb_new(config->ageing_s, config->max_macs);
	if (!b->fdb)
		goto fail;
	b->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (b->event_fd < 0)
		goto fail;
	int r = arena_init(&b->arena, config->netdev_queues, frames, config->zerocopy);

	if (r < 0) {
		errno = -r;
		goto fail;
	}
	for (u32 i = 0; i < config->workers; i++) {
		b->workers[i] = worker_new(b, i);
		if (!b->workers[i])
			goto fail;
	}
	return b;
fail:;
	int error = errno;

	xn_bridge_free(b);
	errno = error;
	return NULL;
}

int xn_bridge_start(struct xn_bridge *b)
{
	if (b->running)
		return -EALREADY;
	b->running = true;
	for (u32 i = 0; i < b->config.workers; i++) {
		int r = worker_start(b->workers[i]);

		if (r < 0) {
			__atomic_store_n(&b->running, false, __ATOMIC_RELEASE);
			for (u32 done = 0; done < i; done++)
				worker_join(b->workers[done]);
			return r;
		}
	}
	return 0;
}

int xn_bridge_stop(struct xn_bridge *b)
{
	if (!b->running)
		return 0;
	__atomic_store_n(&b->running, false, __ATOMIC_RELEASE);
	for (u32 i = 0; i < b->config.workers; i++)
		worker_join(b->workers[i]);
	return 0;
}

void xn_bridge_free(struct xn_bridge *b)
{
	if (!b)
		return;
	xn_bridge_stop(b);
	for (u32 i = 0; i < b->ports_n; i++)
		if (b->ports[i].kind != PORT_NONE)
			xn_port_remove(b, i);
	for (u32 i = 0; i < b->config.workers; i++)
		worker_free(b->workers[i]);
	arena_release(&b->arena);
	free(b->fdb);
	if (b->event_fd >= 0)
		close(b->event_fd);
	pthread_cond_destroy(&b->parking.changed);
	pthread_mutex_destroy(&b->parking.mutex);
	free(b);
}

int xn_bridge_event_fd(struct xn_bridge *b)
{
	return b->event_fd;
}

uint32_t xn_bridge_events(struct xn_bridge *b)
{
	u64 ignored;

	/* The fd is cleared before the bits, so that a bit set in between signals it again. */
	if (read(b->event_fd, &ignored, sizeof(ignored)) < 0 && errno != EAGAIN)
		return 0;
	return __atomic_exchange_n(&b->events, 0, __ATOMIC_ACQ_REL);
}

int xn_worker_stats(struct xn_bridge *b, uint32_t worker, struct xn_worker_stats *out)
{
	if (worker >= b->config.workers)
		return -ENOENT;
	*out = b->workers[worker]->stats;
	return 0;
}

/* ---- public: addresses ---- */

static u32 seconds(void)
{
	return (u32)(monotonic_ns() / 1000000000u);
}

int xn_fdb_dump(struct xn_bridge *b, struct xn_fdb_entry *out, uint32_t max)
{
	return (int)fdb_dump(b->fdb, out, max, seconds());
}

int xn_fdb_flush(struct xn_bridge *b, uint32_t port)
{
	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	fdb_flush(b->fdb, port, false);
	bridge_event(b, XN_EVENT_FDB);
	return 0;
}

int xn_port_set_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6], int check_source)
{
	u64 value = 0;

	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	memcpy(&value, mac, ETH_ALEN);
	if (!value || mac_is_group(value))
		return -EINVAL;
	workers_park(b);
	u64 old = b->ports[port].mac;

	if (old && old != value)
		fdb_flush(b->fdb, port, true);
	int r = fdb_set_static(b->fdb, value, port);

	if (r) {
		/* Its old place is free: nobody else runs. */
		if (old)
			(void)fdb_set_static(b->fdb, old, port);
	} else {
		b->ports[port].mac = value;
		b->ports[port].check_source = check_source;
	}
	guests_settle_lending(b);
	workers_resume(b);
	bridge_event(b, XN_EVENT_FDB);
	return r;
}

/* ---- public: ports ---- */

/* A free port id, its port cleared; -ENOSPC. Call with the workers parked. */
static int port_new(struct xn_bridge *b, enum port_kind kind)
{
	for (u32 id = 0; id < XN_MAX_PORTS; id++) {
		if (b->ports[id].kind != PORT_NONE)
			continue;
		b->ports[id] = (struct port){.kind = kind, .id = id, .bridge = b};
		if (id >= b->ports_n)
			b->ports_n = id + 1;
		return (int)id;
	}
	return -ENOSPC;
}

int xn_port_add_guest(struct xn_bridge *b, uint32_t pairs)
{
	if (!pairs || pairs > XN_MAX_PAIRS)
		return -EINVAL;
	struct virtqueue *rings = aligned_alloc(XN_CACHELINE, 2 * pairs * sizeof(*rings));

	if (!rings)
		return -ENOMEM;
	memset(rings, 0, 2 * pairs * sizeof(*rings));
	workers_park(b);
	int id = port_new(b, PORT_GUEST);

	if (id < 0) {
		free(rings);
	} else {
		struct port *p = &b->ports[id];

		p->guest.pairs = pairs;
		p->guest.rings = rings;
		for (u32 i = 0; i < 2 * pairs; i++) {
			rings[i].port = p;
			rings[i].index = i;
			rings[i].kick_fd = rings[i].call_fd = rings[i].err_fd = -1;
		}
	}
	workers_resume(b);
	return id;
}

int xn_port_add_netdev(struct xn_bridge *b, uint32_t queues)
{
	if (!queues || queues > XN_MAX_NETDEV_QUEUES)
		return -EINVAL;
	struct netdev_queue *queue = aligned_alloc(XN_CACHELINE, queues * sizeof(*queue));

	if (!queue)
		return -ENOMEM;
	memset(queue, 0, queues * sizeof(*queue));
	workers_park(b);
	int id = port_new(b, PORT_NETDEV);

	if (id < 0) {
		free(queue);
	} else {
		b->ports[id].netdev.queues = queues;
		b->ports[id].netdev.queue = queue;
		b->ports[id].netdev.group_fd = -1;
	}
	workers_resume(b);
	return id;
}

int xn_port_remove(struct xn_bridge *b, uint32_t port)
{
	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	struct port *p = &b->ports[port];

	if (p->kind == PORT_GUEST) {
		guest_park(p);
		guest_release(p);
	} else {
		workers_park(b);
		netdev_release(p);
	}
	fdb_flush(b->fdb, port, true);
	p->kind = PORT_NONE;
	guests_settle_lending(b);
	workers_resume(b);
	bridge_event(b, XN_EVENT_FDB | XN_EVENT_UMEM);
	return 0;
}

int xn_queue_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t direction, struct xn_queue_stats *out)
{
	const struct xn_queue_stats *from;

	if (port >= XN_MAX_PORTS || direction > XN_TX)
		return -ENOENT;
	const struct port *p = &b->ports[port];

	if (p->kind == PORT_GUEST && queue < p->guest.pairs)
		from = &p->guest.rings[2 * queue + direction].stats;
	else if (p->kind == PORT_NETDEV && queue < p->netdev.queues)
		from = direction == XN_RX ? &p->netdev.queue[queue].rx : &p->netdev.queue[queue].tx;
	else
		return -ENOENT;
	const uint64_t *words = (const uint64_t *)from;

	for (u32 i = 0; i < sizeof(*out) / sizeof(*words); i++)
		((uint64_t *)out)[i] = counted(&words[i]);
	return 0;
}
