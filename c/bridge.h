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
#include "guard.h"
#include "vring.h"
#include "worker.h"
#include "xsk.h"

/* No part of an address. */
#define STRAY (1ull << 63)

enum port_kind { PORT_NONE, PORT_GUEST, PORT_NETDEV };

struct guest {
	u32 pairs;
	u32 ready_n;
	u32 ready[XN_MAX_PAIRS]; /* pairs whose receive ring takes frames */
	u32 choices;		 /* of them, that a worker's frames are spread over by flow ... */
	u32 choice_step;	 /* ... every so manieth, from the worker's own number on; 1: all, whoever delivers */
	u64 features;
	u8 sends; /* enum view_need: what it may ask for, and what it takes */
	u8 takes;
	struct guard guard;
	struct mem *mem;
	struct mem_alarms alarms;
	u32 taught;		 /* of the bridge's changes, the last that this guest has taught ... */
	u64 taught_at;		 /* ... in cycles */
	u64 stray;		 /* STRAY | the source of a frame that was dropped for it; 0: none of late */
	enum xn_zerocopy lends;	 /* the least that a netdev must ask for to be lent its frames; OFF: none is */
	u64 umem;		 /* the first UMEM that has all its memory */
	bool recalling;		 /* nothing more is lent, and what is comes back */
	bool overdue;		 /* what it lent once had to be called back by closing sockets: it lends no more */
	struct virtqueue *rings; /* 2 * pairs */
};

struct netdev_queue {
	struct xsk *xsk;
	bool lost;		  /* its socket was closed here, not by whoever opened it */
	struct xn_xsk_stats past; /* of sockets that this queue had before */
	struct xn_queue_stats rx XN_ALIGNED;
	struct xn_queue_stats tx XN_ALIGNED;
};

struct netdev {
	u32 queues;
	u32 ready_n;
	u32 ready[XN_MAX_NETDEV_QUEUES]; /* queues with an open socket */
	int group_fd;			 /* AF_PACKET, group-addressed frames; -1: none */
	bool group_failed;
	struct source group;
	struct netdev_queue *queue;
};

struct port {
	enum port_kind kind;
	u32 id;
	struct xn_bridge *bridge;
	u32 macs_n; /* 0: learned */
	u64 macs[XN_MAX_OWN_MACS];
	bool check_source;
	bool allocated;
	union {
		struct guest guest;
		struct netdev netdev;
	};
};

struct xn_bridge {
	struct xn_bridge_config config;
	struct port ports[XN_MAX_PORTS];
	u32 ports_n; /* ids below this may be in use */
	struct fdb *fdb;
	u32 changes; /* addresses that guests have taught anew, so far */
	u32 steered; /* of them, those that the interfaces know of */
	bool steers; /* somebody tells them */
	struct arena arena;
	struct worker *workers[XN_MAX_WORKERS];
	u64 cycles_per_us;
	u64 spin_cycles;
	bool running;
	struct parking parking;
	struct events events;
};

/* Whether the address was given to the port. */
static inline bool port_owns(const struct port *p, u64 mac)
{
	for (u32 i = 0; i < p->macs_n; i++)
		if (p->macs[i] == mac)
			return true;
	return false;
}

/*
 * Takes n views (at most XN_BURST) that `from` got on its queue `queue` to where they go, and counts them in `stats`.
 * Views marked VIEW_DROPPED are counted as that. Of a guest, whose ring keeps the rest, it takes no more than one poll may
 * cost and the netdev has room for, and returns how many it has dealt with. A frame to more ports than that is flooded in
 * parts: *flood_next says where it goes on, when 0 is returned and the same chain is brought again. NULL: all at once.
 */
u32 bridge_forward(struct worker *w, struct port *from, u32 queue, struct view *views, u32 n,
		   struct xn_queue_stats *stats, u32 *flood_next);

/*
 * While parked: floods a RARP with this source address, as a frame of the port. False: the address is not the port's to
 * use, and nothing was sent.
 */
bool bridge_announce(struct worker *w, struct port *from, u64 mac, struct xn_queue_stats *stats);

/* The ports' half of it. Views are given by index; what is delivered or lost is counted there. */
void guest_deliver(struct worker *w, struct port *p, const struct view *views, const u8 *which, u32 n);
void netdev_deliver(struct worker *w, struct port *p, u32 queue, const struct view *views, const u8 *which, u32 n);
/* Descriptors that the netdev's queue takes now without loss, of which `wanted` must go at once; UINT32_MAX: it will drop, not wait. */
u32 netdev_room(struct worker *w, struct port *p, u32 queue, u32 wanted);
/* Takes back what the kernel has sent. */
void netdev_reap(struct xsk *x);
/* A loan takes too long: copies what can be, and asks for the socket to be closed and opened again. */
void netdev_is_stuck(struct xsk *x);
/* While parked: ends the loans that can be ended; all of them, by closing the socket, if they may not be `patient`. */
void netdev_recall(struct xsk *x, bool patient);
/* Tells the kernel of frames submitted to this socket; false: it did not take them all, try again soon. */
bool netdev_kick(struct xsk *x);

/* What a started transmit ring is to its worker, by layout; and a receive ring. */
extern const struct source_ops split_source, packed_source, receive_source;
/* An AF_XDP socket, and one that gets frames in several descriptors; the AF_PACKET socket. */
extern const struct source_ops xsk_source, chains_source, group_source;

/* While parked: drops the frames that wait for buffers of a receive ring. */
void guest_drop_waiting(struct virtqueue *q);
/* Hands back chains whose loans have ended; returns how many. */
u32 guest_take_back(struct virtqueue *q, u64 now);
/* Parks the workers, and calls back all that the port has lent. */
void guest_park(struct port *p);
/* While parked: what every guest may lend, after a change of memory, addresses or ports. */
void guests_settle_lending(struct xn_bridge *b);
void guest_release(struct port *p);
/* While parked: finds the parts of the ring in memory; false: not all of each is there, or it is misaligned. */
bool guest_translate_ring(struct virtqueue *q, const struct mem *m);
/* While parked: nothing touches the ring afterwards, and the frames that wait for it are dropped. */
void guest_stop_ring(struct virtqueue *q);
/* Stopped, and without its file descriptors. */
void guest_close_ring(struct virtqueue *q);
void netdev_release(struct port *p);
/* Recomputes what depends on which rings and sockets are up, and gives every source to its worker. */
void guest_settle(struct port *p);
void netdev_settle(struct port *p);

static inline bool port_is_ready(const struct port *p)
{
	return p->kind == PORT_GUEST ? p->guest.ready_n : p->kind == PORT_NETDEV && p->netdev.ready_n;
}

/* The port with this id and kind; NULL: none. */
static inline struct port *bridge_port(struct xn_bridge *b, u32 id, enum port_kind kind)
{
	return id < XN_MAX_PORTS && b->ports[id].kind == kind ? &b->ports[id] : NULL;
}

#endif
