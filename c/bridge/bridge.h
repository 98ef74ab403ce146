/*
 * The bridge: ports, addresses, and the way of a burst from one port to others.
 *
 * Everything here is changed by the control thread while the workers are parked, except the counters and what the parts
 * (vring, xsk, fdb) say of themselves.
 */
#ifndef XN_BRIDGE_H
#define XN_BRIDGE_H

#include "events.h"
#include "fdb.h"
#include "memory/arena.h"
#include "port.h"
#include "worker/worker.h"

struct xn_bridge {
	struct xn_bridge_config config;
	struct port *ports[XN_MAX_PORTS]; /* NULL: there is none */
	u32 ports_n;			  /* ids below this may be in use */
	struct fdb *fdb;
	u32 changes; /* addresses that guests have taught anew, so far */
	u32 steered; /* of them, those that the interfaces know of */
	bool steers; /* somebody tells them */
	struct arena arena;
	struct xn_queue_stats gone[2]; /* of ports that are no more, by enum xn_way */
	struct events events;
	struct workers workers;
};

/*
 * Takes n views (at most XN_BURST) to where they go, and counts them. Views marked VIEW_DROPPED are counted as that. Of a
 * guest, whose ring keeps the rest, it takes no more than one poll may cost and the netdev has room for, and returns how many
 * it has dealt with. A frame to more ports than that is flooded in parts: when 0 is returned and the same chain is brought
 * again, *burst->flood_next says where it goes on.
 */
u32 bridge_forward(struct worker *w, struct burst *burst, struct view *views, u32 n);

/*
 * While parked: floods a RARP with this source address, as a frame of the port. False: the address is not the port's to
 * use, and nothing was sent.
 */
bool bridge_announce(struct worker *w, struct port *from, u64 mac, struct xn_queue_stats *stats);

/* While parked: gives a port, of which the rest is as its kind has it, its id, which is returned; -ENOSPC. */
int bridge_add_port(struct xn_bridge *b, struct port *p);
/* While parked: every port follows a change of memory, addresses or ports. */
void bridge_settle(struct xn_bridge *b);

/* The port with this id, if it is of this kind; NULL: none. */
static inline struct port *bridge_port(const struct xn_bridge *b, u32 id, enum port_kind kind)
{
	return id < XN_MAX_PORTS && b->ports[id] && b->ports[id]->kind == kind ? b->ports[id] : NULL;
}

/* The number of an address that a station may have; 0: it is none. */
static inline u64 station_of(const uint8_t mac[6])
{
	u64 value = 0;

	memcpy(&value, mac, ETH_ALEN);
	value = le64toh(value);
	return mac_is_group(value) ? 0 : value;
}

#endif
