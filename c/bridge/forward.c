/*
 * The way of a burst: where each frame goes, by its addresses and VLAN, and in what form its receiver takes it.
 */
#include <linux/if_arp.h>

#include "bridge.h"
#include "frame/csum.h"
#include "frame/packet.h"

enum {
	MAC_CONTROL = 0x8808,
	/* Usually it is some 200, and 10000 where addresses come in numbers. A guest that is not answered asks again in a second. */
	STEERING_US = 1000000
};
/* No number of frames: one has been flooded to all ports, in parts. */
enum { FLOODED = UINT32_MAX };

/* No reason to drop a frame. */
enum { GOOD = XN_DROP_COUNT };

/* Remembers where a frame came from. Else than GOOD: why it goes no further. */
static u32 learn(struct worker *w, const struct burst *burst, u64 src, u64 dst, u16 vlan)
{
	struct port *from = burst->from;
	struct xn_bridge *b = from->bridge;
	enum fdb_teacher teacher = FDB_GUEST;

	if (!from->wire) {
		/* Its own was given: there is nothing to learn. */
		if (port_owns(from, src))
			return GOOD;
		if (from->check_source)
			return XN_DROP_SPOOF;
		if (unlikely(mac_is_group(src) || !src))
			return XN_DROP_SPOOF;
	} else if (mac_is_group(src) || !src) {
		return GOOD;
	} else {
		teacher = mac_is_group(dst) ? FDB_WIRE_GROUP : FDB_WIRE;
	}
	switch (fdb_learn(b->fdb, src, vlan, from->id, teacher, w->now)) {
	case FDB_KNOWN:
		break;
	case FDB_NEW:
		from->taught_at = w->turn;
		__atomic_store_n(&from->taught, __atomic_add_fetch(&b->changes, 1, __ATOMIC_RELEASE), __ATOMIC_RELAXED);
		events_tell(&b->events, XN_EVENT_FDB);
		break;
	case FDB_LEARNED:
		events_tell(&b->events, XN_EVENT_FDB);
		break;
	case FDB_REFLECTED:
		/* Who was to have it has it, and the guest would take it for another's. */
		return XN_DROP_REFLECTED;
	case FDB_FOREIGN:
		/* Another guest's own address. On the wire that may be the guest on its way. */
		return from->wire ? GOOD : XN_DROP_SPOOF;
	case FDB_FULL:
		count(&burst->stats->unlearned, 1);
		break;
	}
	return GOOD;
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

/* What there is to be thought of before a burst is delivered. */
struct ways {
	bool to_few; /* a frame goes to a port that may have no room for it */
	bool costly; /* a frame goes to several ports, or is several, or is to be summed */
};

/* Gives each frame its way. */
static struct ways classify(struct worker *w, const struct burst *burst, struct view *views, u32 n)
{
	struct port *from = burst->from;
	const struct xn_bridge *b = from->bridge;
	u64 last_src = 0, last_dst = NO_MAC;
	u16 last_vlan = 0, last_port = 0;
	struct ways ways = {0};
	u32 fault = GOOD;

	for (u32 i = 0; i < n; i++) {
		struct view *v = &views[i];

		if (v->port == VIEW_DROPPED)
			continue;
		u64 src = view_src(v), dst = view_dst(v);
		u16 vlan = view_vlan(v);

		if (unlikely(is_link_local(v, dst)) && !from->wire) {
			offence_note(&from->policy, v, NULL);
			view_drop(v, XN_DROP_POLICY);
			continue;
		}
		/* Bursts come in trains of one flow: look up what differs. */
		if (unlikely(last_dst == NO_MAC || src != last_src || vlan != last_vlan))
			fault = learn(w, burst, src, dst, vlan);
		if (unlikely(fault != GOOD)) {
			if (fault == XN_DROP_SPOOF)
				offence_note(&from->spoof, v, NULL);
			view_drop(v, fault);
			last_dst = NO_MAC;
			continue;
		}
		if (dst != last_dst || vlan != last_vlan) {
			u32 port = mac_is_group(dst) ? FDB_NONE : fdb_lookup(b->fdb, dst, vlan, w->now);

			last_port = port == FDB_NONE ? VIEW_FLOOD : (u16)port;
			ways.to_few |= port != FDB_NONE && b->ports[port]->verbs->room;
			ways.costly |= port == FDB_NONE;
		}
		last_src = src;
		last_dst = dst;
		last_vlan = vlan;
		v->port = last_port;
		ways.costly |= v->needs;
		/* Back where it came from; or from one interface to another, which would close loops of the networks outside. */
		if (unlikely(v->port == from->id || (v->port < VIEW_FLOOD && from->wire && b->ports[v->port]->wire)))
			view_drop(v, XN_DROP_NO_PORT);
	}
	return ways;
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

/* How many views, from the first, can go before one finds its port full. */
static u32 with_room(struct worker *w, const struct burst *burst, const struct view *views, u32 n)
{
	struct port *const *ports = burst->from->bridge->ports;
	u32 port = VIEW_DROPPED, room = 0;

	for (u32 i = 0; i < n; i++) {
		if (views[i].port >= VIEW_FLOOD || !ports[views[i].port]->verbs->room)
			continue;
		if (views[i].port != port) {
			/* A burst to several interfaces is rare; the first of them decides. */
			if (port != VIEW_DROPPED)
				continue;
			port = views[i].port;
			room = ports[port]->verbs->room(w, ports[port], burst->queue, descriptors_of(&views[i]));
		}
		u32 wanted = descriptors_of(&views[i]);

		if (room < wanted)
			return i;
		room -= wanted;
	}
	return n;
}

static void deliver_plain(struct worker *w, struct port *to, struct burst *burst, const struct view *views,
			  const u8 *which, u32 n)
{
	to->verbs->deliver(w, to, burst, views, which, n);
}

/* Completes a checksum that the port does not take as it is. What becomes of it at an interface is counted there. */
static void suit_csum(const struct port *to, struct view *v, struct xn_queue_stats *stats)
{
	if (v->needs & ~to->takes) {
		csum_complete(v);
		count(&stats->csum_completed, 1);
	} else if (v->needs && !to->wire) {
		count(&stats->csum_partial, 1);
	}
}

/* Cuts a frame that the port does not take whole. */
static void deliver_cut(struct worker *w, struct port *to, const struct burst *burst, struct view *whole)
{
	/* The payload of a segment is no chain of its own. */
	struct burst segments = {.from = burst->from, .queue = burst->queue, .stats = burst->stats};
	struct xn_queue_stats *stats = burst->stats;
	struct gso_room *room = &w->cut;
	u8 which[XN_BURST];
	struct gso cut;
	u32 made = 0, n;

	gso_start(&cut, whole);
	while ((n = gso_next(&cut, room))) {
		for (u32 i = 0; i < n; i++) {
			which[i] = (u8)i;
			suit_csum(to, &room->views[i], stats);
		}
		deliver_plain(w, to, &segments, room->views, which, n);
		made += n;
	}
	/* That of a datagram, over all of its fragments. */
	if (whole->needs & NEED_UFO)
		count(&stats->csum_completed, 1);
	count(&stats->cut, 1);
	count(&stats->segments, made - 1);
}

/* In order: what the port takes as it is in runs, the others changed into what it does take. */
static __attribute__((noinline)) void deliver_changed(struct worker *w, struct port *to, struct burst *burst,
						      struct view *views, u8 *which, u32 n)
{
	u32 from = 0;

	for (u32 i = 0; i < n; i++) {
		struct view *v = &views[which[i]];
		u8 missing = v->needs & (u8)~to->takes;

		if (missing & NEED_CUT) {
			if (i > from)
				deliver_plain(w, to, burst, views, which + from, i - from);
			deliver_cut(w, to, burst, v);
			from = i + 1;
		} else {
			suit_csum(to, v, burst->stats);
		}
	}
	if (n > from)
		deliver_plain(w, to, burst, views, which + from, n - from);
}

/* Frames that all go to one port; `plain`: none of them needs anything. */
static always_inline void deliver(struct worker *w, struct port *to, struct burst *burst, struct view *views, u8 *which,
				  u32 n, bool plain)
{
	if (likely(plain))
		deliver_plain(w, to, burst, views, which, n);
	else
		deliver_changed(w, to, burst, views, which, n);
}

/* From the wire to the one guest that it is for: frames of a flow in one, where it takes such. Returns how many are left. */
static u32 join(struct worker *w, const struct port *to, struct view *views, u8 *which, u32 n,
		struct xn_queue_stats *stats)
{
	struct gro_done done = {0};

	n = gro_join(&w->joined, views, which, n, to->takes, &done);
	count(&stats->joined, done.joined);
	count(&stats->csum_verified, done.verified);
	return n;
}

static void forward_unicast(struct worker *w, struct burst *burst, u32 port, struct view *views, u8 *which, u32 n,
			    bool plain)
{
	struct port *to = burst->from->bridge->ports[port];

	if (burst->from->wire && to->takes & NEED_CUT) {
		u32 left = join(w, to, views, which, n, burst->stats);

		plain = plain && left == n;
		n = left;
	}
	deliver(w, to, burst, views, which, n, plain);
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

/* To one station, of which nobody knows where it is. */
static bool is_unknown(const struct view *v)
{
	return !mac_is_group(view_dst(v));
}

/* An unknown station is not behind a guest that may have its own addresses only: these are known. */
static bool floods_to(const struct port *from, const struct port *to, bool unknown)
{
	return to && to != from && to->ready && !(from->wire && to->wire) &&
	       !(unknown && !to->wire && to->check_source);
}

static void count_copies(struct xn_queue_stats *stats, u32 ports, u32 n)
{
	if (ports)
		count(&stats->copies, (u64)(ports - 1) * n);
	else
		drop(stats, XN_DROP_NO_PORT, n);
}

/* Delivers to all ports. */
static void flood(struct worker *w, struct burst *burst, struct view *views, u64 mask, bool plain)
{
	const struct port *from = burst->from;
	const struct xn_bridge *b = from->bridge;
	u8 all[XN_BURST], to_many[XN_BURST];
	u32 n = 0, many = 0, ports = 0, open_ports = 0;

	for (; mask; mask &= mask - 1) {
		u8 i = (u8)__builtin_ctzll(mask);

		all[n++] = i;
		if (!is_unknown(&views[i]))
			to_many[many++] = i;
	}
	for (u32 i = 0; i < b->ports_n; i++) {
		struct port *to = b->ports[i];

		if (floods_to(from, to, true)) {
			open_ports++;
			deliver(w, to, burst, views, all, n, plain);
		} else if (floods_to(from, to, false)) {
			ports++;
			if (many)
				deliver(w, to, burst, views, to_many, many, plain);
		}
	}
	count_copies(burst->stats, ports + open_ports, many);
	count_copies(burst->stats, open_ports, n - many);
}

/* ---- what one poll takes on ---- */

/* What it costs to deliver a frame to one port, ns. */
static u64 price_of(const struct view *v)
{
	u64 price = PRICE_FRAME + v->len / BYTES_PER_NS;

	/* Whole, it may be summed, and cut: who does not take it as it is decides. */
	if (v->needs)
		price += v->len / BYTES_PER_NS + (v->needs & NEED_CUT ? vnet_segments(v) * PRICE_SEGMENT : 0);
	return price;
}

static u32 flooded_ports(const struct port *from, bool unknown)
{
	u32 ports = 0;

	for (u32 i = 0; i < from->bridge->ports_n; i++)
		ports += floods_to(from, from->bridge->ports[i], unknown);
	return ports;
}

/* How many views, from the first, one poll takes on; at least one. *price, ns: of these. */
static __attribute__((noinline)) u32 affordable(const struct port *from, const struct view *views, u32 n, u64 *price)
{
	u32 ports[2] = {0}, i = 0;

	do {
		bool floods = views[i].port == VIEW_FLOOD, unknown = is_unknown(&views[i]);

		if (floods && !ports[unknown])
			ports[unknown] = flooded_ports(from, unknown);
		if (views[i].port != VIEW_DROPPED)
			*price += price_of(&views[i]) * (floods ? ports[unknown] : 1);
		i++;
	} while (i < n && *price <= POLL_NS);
	return i;
}

/*
 * Floods a frame to as many ports, from *burst->flood_next on, as one poll takes on. True: that was the last of them, and
 * it is 0; else it goes on there, with what the guest has in that place by then. The frame itself is counted already.
 */
static bool flood_part(struct worker *w, struct burst *burst, struct view *v)
{
	const struct port *from = burst->from;
	const struct xn_bridge *b = from->bridge;
	u32 *next = burst->flood_next;
	const u64 price = price_of(v);
	const bool unknown = is_unknown(v);
	u64 paid = 0;
	u8 which = 0;

	/* A loan would be of a chain that is taken anew. */
	burst->lender = NULL;
	for (bool first = !*next; *next < b->ports_n; ++*next) {
		if (!floods_to(from, b->ports[*next], unknown))
			continue;
		if (paid > POLL_NS)
			break;
		paid += price;
		deliver(w, b->ports[*next], burst, v, &which, 1, !v->needs);
		count(&burst->stats->copies, !first);
		first = false;
	}
	w->price += paid;
	if (*next < b->ports_n)
		return false;
	*next = 0;
	return true;
}

/* Where the frames of a burst go, a bit each, and what they are together. */
struct sorted {
	u64 unicast, flooded, dropped;
	u64 bytes;
	bool one_way; /* all are unicast, to one port; the masks are empty then */
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

static void count_frames(struct worker *w, struct xn_queue_stats *stats, u32 n, u64 bytes)
{
	count(&stats->packets, n);
	count(&stats->bytes, bytes);
	count(&stats->bursts, 1);
	count(&w->stats.packets, n);
}

/*
 * Limits a guest's burst to what one poll takes on. 0: it has begun, or gone on, with a frame that is too much for one;
 * *burst->flood_next is 0 again when it is done with that.
 */
static __attribute__((noinline)) u32 limit_burst(struct worker *w, struct burst *burst, struct view *views, u32 n)
{
	u32 *next = burst->flood_next;
	u64 price = 0;

	/* What is flooded in parts and has become another frame is that from here on. */
	if (*next && views->port != VIEW_FLOOD)
		*next = 0;
	if (!*next) {
		n = affordable(burst->from, views, n, &price);
		if (n > 1 || views->port != VIEW_FLOOD || price <= POLL_NS) {
			w->price += price;
			return n;
		}
		count_frames(w, burst->stats, 1, views->len);
	}
	return flood_part(w, burst, views) ? FLOODED : 0;
}

/*
 * A guest has taught an address that the interfaces do not know of yet: what it sends now would be answered before they do,
 * and the answer goes to the host. So it waits in the ring, but not for a control thread that is late.
 */
static bool waits_for_steering(const struct worker *w, const struct port *from)
{
	const struct xn_bridge *b = from->bridge;
	u32 taught = __atomic_load_n(&from->taught, __ATOMIC_RELAXED);

	return unlikely((int32_t)(taught - __atomic_load_n(&b->steered, __ATOMIC_RELAXED)) > 0) &&
	       __atomic_load_n(&b->steers, __ATOMIC_RELAXED) &&
	       w->turn - from->taught_at < STEERING_US * w->cycles_per_us;
}

u32 bridge_forward(struct worker *w, struct burst *burst, struct view *views, u32 n)
{
	const struct port *from = burst->from;
	struct xn_queue_stats *stats = burst->stats;

	if (burst->flood_next && waits_for_steering(w, from))
		return 0;
	struct ways ways = classify(w, burst, views, n);
	u8 which[XN_BURST];

	if (burst->flood_next) {
		/* By one of these. */
		if (waits_for_steering(w, from))
			return 0;
		if (unlikely(ways.costly || *burst->flood_next))
			n = limit_burst(w, burst, views, n);
		if (n == FLOODED)
			return 1;
		if (ways.to_few)
			n = with_room(w, burst, views, n);
	}
	if (!n)
		return 0;
	struct sorted s = sort(views, n);

	count_frames(w, stats, n, s.bytes);
	if (likely(s.one_way)) {
		for (u32 i = 0; i < XN_BURST; i++)
			which[i] = (u8)i;
		forward_unicast(w, burst, views->port, views, which, n, s.plain);
		return n;
	}
	for (; s.dropped; s.dropped &= s.dropped - 1)
		drop(stats, views[__builtin_ctzll(s.dropped)].drop, 1);
	while (s.unicast) {
		u32 port = views[__builtin_ctzll(s.unicast)].port, taken = take_one_way(views, &s.unicast, which);

		forward_unicast(w, burst, port, views, which, taken, s.plain);
	}
	if (s.flooded)
		flood(w, burst, views, s.flooded, s.plain);
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
	struct burst burst = {.from = from, .stats = stats};

	_Static_assert(sizeof(frame) == ETH_ZLEN, "the shortest frame, but for its checksum");
	mac = htole64(mac);
	memcpy(frame.eth.h_source, &mac, ETH_ALEN);
	memcpy(frame.sender, &mac, ETH_ALEN);
	memcpy(frame.target, &mac, ETH_ALEN);
	view_snapshot(&view);
	/* It may have slept for long, or not have begun. */
	w->now = monotonic_s();
	w->turn = cycles();
	w->payer = &w->accounts[from->id];
	if (learn(w, &burst, view_src(&view), view_dst(&view), 0) != GOOD)
		return false;
	bridge_forward(w, &burst, &view, 1);
	return true;
}
