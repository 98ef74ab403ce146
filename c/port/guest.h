/*
 * A guest port: virtqueues in the memory of one guest.
 */
#ifndef XN_GUEST_H
#define XN_GUEST_H

#include "bridge/bridge.h"
#include "frame/guard.h"
#include "ring/vring.h"

struct guest {
	struct port port;
	u32 pairs;
	u32 ready_n;
	u32 ready[XN_MAX_PAIRS]; /* pairs whose receive ring takes frames */
	u32 choices;		 /* of them, that a worker's frames are spread over by flow ... */
	u32 choice_step;	 /* ... every so manieth, from the worker's own number on; 1: all, whoever delivers */
	u64 features;
	u8 sends; /* enum view_need: what it may ask for */
	struct guard guard;
	struct mem *mem;
	struct mem_alarms alarms;
	struct lending lending;
	bool recalling;		 /* nothing more is lent, and what is comes back */
	bool overdue;		 /* what it lent once had to be called back by closing sockets: it lends no more */
	struct virtqueue *rings; /* 2 * pairs */
};

/* What a started transmit ring is to its worker, by layout; and a receive ring. */
extern const struct source_ops split_source, packed_source, receive_source;

static inline struct guest *guest_of(const struct port *p)
{
	return container_of(p, struct guest, port);
}

/* NULL: no guest's is the port with this id. */
static inline struct guest *guest_at(const struct xn_bridge *b, u32 id)
{
	struct port *p = bridge_port(b, id, PORT_GUEST);

	return p ? guest_of(p) : NULL;
}

void guest_deliver(struct worker *w, struct port *p, struct burst *burst, const struct view *views, const u8 *which,
		   u32 n);
/* While parked: drops the frames that wait for buffers of a receive ring. */
void guest_drop_waiting(struct virtqueue *q);
/* Parks the workers, and calls back all that the port has lent. */
void guest_park(struct port *p);
/* While parked: what it may lend. */
void guest_settle_lending(struct port *p);
/* While parked: recomputes what depends on which rings are up. */
void guest_settle_rings(struct guest *g);
/* While parked: finds the parts of the ring in memory; false: not all of each is there, or it is misaligned. */
bool guest_translate_ring(struct virtqueue *q, const struct mem *m);
/* While parked: nothing touches the ring afterwards, and the frames that wait for it are dropped. */
void guest_stop_ring(struct virtqueue *q);
/* Stopped, and without its file descriptors. */
void guest_close_ring(struct virtqueue *q);

#endif
