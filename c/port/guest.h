/*
 * A guest port: virtqueues in the memory of one guest.
 */
#ifndef XN_GUEST_H
#define XN_GUEST_H

#include <fcntl.h>
#include <unistd.h>

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
	struct dirty_log *log; /* NULL: its frontend has given none */
	int log_fd;	       /* to be signalled when something is in it; -1: none */
	struct lending lending;
	bool recalling;		 /* nothing more is lent, and what is comes back */
	bool overdue;		 /* what it lent once had to be called back by closing sockets: it lends no more */
	struct virtqueue *rings; /* 2 * pairs */
};

/* What a started transmit ring is to its worker, by layout and whether it is logged; and a receive ring. */
extern const struct source_ops split_source, packed_source, split_logged_source, packed_logged_source, receive_source;

static inline void guest_close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Replaces *to by a copy of `from` (-1: none). */
static inline int guest_keep_fd(int *to, int from)
{
	int copy = -1;

	if (from >= 0) {
		copy = fcntl(from, F_DUPFD_CLOEXEC, 0);
		if (copy < 0)
			return -errno;
	}
	guest_close_fd(to);
	*to = copy;
	return 0;
}

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
/* While parked: has each ring log what it is to log now. What begins to be logged of a ring is marked, all of it. */
void guest_settle_log(struct guest *g);
/* Whether the log, if one is used with these features, has room for all of this memory and for the rings. */
bool guest_log_fits(const struct guest *g, const struct mem *m, u64 features);
/* While parked: recomputes what depends on which rings are up. */
void guest_settle_rings(struct guest *g);
/* While parked: finds the parts of the ring in memory; false: not all of each is there, or it is misaligned. */
bool guest_translate_ring(struct virtqueue *q, const struct mem *m);
/* While parked: nothing touches the ring afterwards, and the frames that wait for it are dropped. */
void guest_stop_ring(struct virtqueue *q);
/* Stopped, and without its file descriptors. */
void guest_close_ring(struct virtqueue *q);

#endif
